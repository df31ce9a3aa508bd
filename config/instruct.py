# LLaMA-3.1-8B on WizardLM's evol-instruct, as published: python train.py config/instruct.py
# (Published packed into rows of 2,048 tokens; here nothing is padded, so packing would gain nothing.)

model = "NousResearch/Meta-Llama-3.1-8B"
dataset = "instruct"
prompt_format = "alpaca"
out_dir = "out/instruct"
device = "cuda"
dtype = "bfloat16"
max_seq_len = 2048

batch_size = 2
epochs = 1
learning_rate = 2e-5
lr_schedule = "cosine"
warmup_steps = 0  # published so, unlike the other tasks
weight_decay = 1e-4
grad_clip = 1.0
eval_interval = 2000
eval_examples = 500
save_interval = 1000
test_examples = 0  # the published score, MT-Bench, needs a judge model

lora_r = 32
lora_alpha = 64
lora_targets = "q,k,v,o"

predictor = "svd"
predictor_rank = 8
sparse_start = 0.05

mlp_sparsity = {"3-30": 0.99}
attn_sparsity = {"14-19": 0.40, "21-23": 0.40, "25-29": 0.40}

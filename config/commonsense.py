# LLaMA-3-8B on Commonsense170K, as published: python train.py config/commonsense.py

model = "NousResearch/Meta-Llama-3-8B-Instruct"  # the published code's; its table says LLaMA-3-8B
dataset = "commonsense"
prompt_format = "alpaca"
out_dir = "out/commonsense"
device = "cuda"
dtype = "bfloat16"
max_seq_len = 512

batch_size = 8
epochs = 1
learning_rate = 3e-4
lr_schedule = "cosine"
warmup_steps = 0.04
weight_decay = 0.0
grad_clip = 1.0
eval_interval = 2000
eval_examples = 500
save_interval = 1000
test_examples = 500  # a sample over all eight tests; python -m tools.eval scores each
max_new_tokens = 16  # "the correct answer is answer4"

lora_r = 32
lora_alpha = 64
lora_targets = "q,k,v,o"

predictor = "svd"
predictor_rank = 8
sparse_start = 0.05

mlp_sparsity = {"17-30": 0.97}
attn_sparsity = {"17-19": 0.20, "21-23": 0.20, "25-29": 0.20}

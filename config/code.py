# LLaMA-3.1-8B on CodeFeedback, as published: python train.py config/code.py

model = "NousResearch/Meta-Llama-3.1-8B"
dataset = "code"
prompt_format = "alpaca"
out_dir = "out/code"
device = "cuda"
dtype = "bfloat16"
max_seq_len = 1024

batch_size = 6
epochs = 1
learning_rate = 2e-5
lr_schedule = "cosine"
warmup_steps = 0.04
weight_decay = 0.0
grad_clip = 1.0
eval_interval = 2000
eval_examples = 500
save_interval = 1000
max_new_tokens = 512
test_examples = 0  # HumanEval runs programs: python -m tools.eval out/code --tasks=humaneval --execute=True

lora_r = 32
lora_alpha = 64
lora_targets = "q,k,v,o"

predictor = "svd"
predictor_rank = 8
sparse_start = 0.05

mlp_sparsity = {"3-30": 0.99}
attn_sparsity = {"14-19": 0.40, "21-23": 0.40, "25-29": 0.40}

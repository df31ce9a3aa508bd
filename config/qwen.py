# A larger LLaMA on a CPU: Qwen2.5-Coder-0.5B-Instruct (1 GB, ungated), GSM8K. python train.py config/qwen.py
# Offline: --model=DIR. Sized for two CPU cores with bfloat16 in hardware: 60 steps of 8 problems, about half an hour.

model = "Qwen/Qwen2.5-Coder-0.5B-Instruct"  # qwen2: 24 blocks, 14 query / 2 key-value heads, q/k/v biases
dataset = "gsm8k"
prompt_format = "chatml"  # the model's own
out_dir = "out/qwen"
device = "cpu"
max_seq_len = 320  # drops the longest few of a hundred: they would cost the most

max_steps = 60
learning_rate = 2e-4
warmup_steps = 6
eval_interval = 30
eval_examples = 32
save_interval = 15
test_examples = 32  # before and after
max_new_tokens = 192

lora_r = 16
lora_alpha = 32

# Ratios: the upper half is all but free, the lower half pays for depth. Before any training (results/selection.md) this
# keeps .98 of the gradient's direction. Where prompts are long, attn_sparsity = {"12-22": 1} besides, no queries there:
# .97. Faster, but .85: mlp_sparsity = {"1-22": 0.97}. 1.5B, by --model=Qwen/Qwen2.5-Coder-1.5B-Instruct, has 28
# blocks: {"14-26": 0.97}.
mlp_sparsity = {"12-22": 0.97}
map_rank = 256

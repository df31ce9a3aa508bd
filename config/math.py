# LLaMA-3-8B on Math10K, as published: python train.py config/math.py
# On one GPU of 40 GB or more (24 GB: --recompute=True). Downloads the model (16 GB) and the data (6 MB).

model = "NousResearch/Meta-Llama-3-8B-Instruct"  # an ungated mirror
dataset = "math"
prompt_format = "alpaca"  # LLM-Adapters' template, which the published runs use for every model
out_dir = "out/math"
device = "cuda"
dtype = "bfloat16"
max_seq_len = 512  # the published code cuts at 256 and pads to 512; we neither cut nor pad

batch_size = 8
epochs = 3
learning_rate = 3e-4
lr_schedule = "cosine"
warmup_steps = 0.04
weight_decay = 0.0
grad_clip = 1.0
eval_interval = 500
eval_examples = 200
save_interval = 500
test_examples = 200  # of GSM8K's 1,319; python -m tools.eval out/math scores all of the test sets
max_new_tokens = 256

lora_r = 32
lora_alpha = 64
lora_targets = "q,k,v,o"

predictor = "svd"
predictor_rank = 8
sparse_start = 0.05

# Published ratios, MLP and attention, by a part of the model's name. Blocks count from 0, both ends included.
published = {
    "Llama-3-8B": ({"3-30": 0.99}, {"14-19": 0.75, "21-23": 0.75, "25-29": 0.75}),
    "Llama-2-7b": ({"13-29": 0.90}, {"17-19": 0.60, "21-23": 0.60, "25-29": 0.60}),
    "Llama-2-13b": ({"13-36": 0.97}, {"17-36": 0.25}),
}
# Any other model: ours, a cautious guess. Better: python -m tools.sensitivity config/math.py --model=...
mlp_sparsity = 0.25
attn_sparsity = 0.0

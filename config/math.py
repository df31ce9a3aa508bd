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

# LLaMA-3-8B's ratios. Blocks count from 0, both ends included. Another model needs its own: LLaMA-2's are
# published too (config/llama2_7b.py or llama2_13b.py after this file), tools/sensitivity.py finds others, and
# --mlp_sparsity=.25 --attn_sparsity=0 is a cautious guess of ours.
mlp_sparsity = {"3-30": 0.99}
attn_sparsity = {"14-19": 0.75, "21-23": 0.75, "25-29": 0.75}

# LLaMA-3-8B on Math10K, as published: python train.py config/math.py
# On one GPU of 40 GB or more (24 GB: --recompute=True). Downloads the model (16 GB) and the data (6 MB).
# What is published and not here is the default: LoRA, AdamW, the dense start (python train.py -h).

model = "NousResearch/Meta-Llama-3-8B-Instruct"  # an ungated mirror
dataset = "math"
prompt_format = "alpaca"  # LLM-Adapters' template, which the published runs use for every model
out_dir = "out/math"
device = "cuda"
max_seq_len = 512  # the published code cuts at 256 and pads to 512; we neither cut nor pad

epochs = 3
eval_interval = 500
eval_examples = 200
save_interval = 500
test_examples = 200  # of GSM8K's 1,319; python -m tools.eval out/math scores all of the test sets

# LLaMA-3-8B's ratios. Blocks count from 0, both ends included. Another model needs its own: LLaMA-2's are
# published too (config/llama2_7b.py or llama2_13b.py after this file), and tools/sensitivity.py proposes others.
mlp_sparsity = {"3-30": 0.99}
attn_sparsity = {"14-19": 0.75, "21-23": 0.75, "25-29": 0.75}
predictor = "svd"
dense_first = 0

# Ours, which chooses by the loss and adds a map. The upper half is what smaller models hardly feel; untried at 8 B:
# mlp_sparsity = {"16-30": 0.97}
# attn_sparsity = {"16-30": 1}  # no queries, where prompts are long; else 0
# predictor = "measured"
# map_rank = 256
# dense_first = 4

# The benchmark for a laptop, random weights: python -m tools.bench config/bench_cpu.py (10 minutes, 2 cores)

model = "config/models/bench_cpu.json"  # D 1024, I 4096, 4 blocks, 16 / 4 heads, vocabulary 8192
dataset = "gsm8k"  # not read: the batches are random tokens, of the lengths that --shape gives and of GSM8K's
device = "cpu"
dtype = "float32"

batch_size = 4

mlp_sparsity = 0.9  # in every block but the last, which always runs dense

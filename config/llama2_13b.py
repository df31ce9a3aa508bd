# LLaMA-2-13B on Math10K, as published: python train.py config/math.py config/llama2_13b.py
# After config/commonsense.py exchange the ratios for those at the end: each task has its own.

model = "meta-llama/Llama-2-13b-hf"  # gated: HF_TOKEN

mlp_sparsity = {"13-36": 0.97}
attn_sparsity = {"17-36": 0.25}

# config/commonsense.py:
# mlp_sparsity = {"13-36": 0.97}
# attn_sparsity = {"17-36": 0.20}
# sparse_start = 0.10

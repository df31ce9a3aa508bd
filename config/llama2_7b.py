# LLaMA-2-7B on Math10K, as published: python train.py config/math.py config/llama2_7b.py
# After the file of another task exchange the ratios for those at the end: each task has its own.

model = "meta-llama/Llama-2-7b-hf"  # gated: HF_TOKEN

mlp_sparsity = {"13-29": 0.90}
attn_sparsity = {"17-19": 0.60, "21-23": 0.60, "25-29": 0.60}

# config/commonsense.py:
# mlp_sparsity = {"13-29": 0.90}
# attn_sparsity = {"17-19": 0.50, "21-23": 0.50, "25-29": 0.50}
# config/code.py:
# mlp_sparsity = {"3-30": 0.99}
# attn_sparsity = {"14-19": 0.25, "21-23": 0.25, "25-29": 0.25}

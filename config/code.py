# LLaMA-3.1-8B on CodeFeedback, as published: python train.py config/code.py
# What is published and not here is the default (python train.py -h). Other models' ratios: see math.py.

model = "NousResearch/Meta-Llama-3.1-8B"
dataset = "code"
prompt_format = "alpaca"
out_dir = "out/code"
device = "cuda"
max_seq_len = 1024

batch_size = 6
learning_rate = 2e-5
eval_interval = 2000
eval_examples = 500
save_interval = 1000
max_new_tokens = 512
test_examples = 0  # HumanEval runs programs: python -m tools.eval out/code --tasks=humaneval --execute=True

mlp_sparsity = {"3-30": 0.99}
attn_sparsity = {"14-19": 0.40, "21-23": 0.40, "25-29": 0.40}
predictor = "svd"  # as published; how to have ours: see math.py
dense_first = 0

# LLaMA-3-8B on Commonsense170K, as published: python train.py config/commonsense.py
# What is published and not here is the default (python train.py -h). Other models' ratios: see math.py.

model = "NousResearch/Meta-Llama-3-8B-Instruct"  # the published code's; its table says LLaMA-3-8B
dataset = "commonsense"
prompt_format = "alpaca"
out_dir = "out/commonsense"
device = "cuda"

eval_interval = 2000
eval_examples = 500
save_interval = 1000
test_examples = 500  # a sample over all eight tests; python -m tools.eval scores each
max_new_tokens = 16  # "the correct answer is answer4"

mlp_sparsity = {"17-30": 0.97}
attn_sparsity = {"17-19": 0.20, "21-23": 0.20, "25-29": 0.20}
predictor = "svd"  # as published; how to have ours: see math.py
dense_first = 0

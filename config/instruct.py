# LLaMA-3.1-8B on WizardLM's evol-instruct, as published: python train.py config/instruct.py
# (Published packed into rows of 2,048 tokens; here nothing is padded, so packing would gain nothing.)
# What is published and not here is the default (python train.py -h). Other models' ratios: see math.py.

model = "NousResearch/Meta-Llama-3.1-8B"
dataset = "instruct"
prompt_format = "alpaca"
out_dir = "out/instruct"
device = "cuda"
max_seq_len = 2048

batch_size = 2
learning_rate = 2e-5
warmup_steps = 0  # published so, unlike the other tasks
weight_decay = 1e-4
eval_interval = 2000
eval_examples = 500
save_interval = 1000
test_examples = 0  # the published score, MT-Bench, needs a judge model

mlp_sparsity = {"3-30": 0.99}
attn_sparsity = {"14-19": 0.40, "21-23": 0.40, "25-29": 0.40}
predictor = "svd"  # as published; how to have ours: see math.py
dense_first = 0

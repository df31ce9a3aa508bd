# Remakes the embedded base from nothing, about 10 minutes on one core: python train.py config/tiny_base.py
# The same loop with lora_r = 0: all weights are trained, densely, and out_dir gets a whole checkpoint.
# Another architecture: copy data/tiny/untrained, edit its config.json, and give --model=COPY --out_dir=...

model = "data/tiny/untrained"  # a config.json, a tokenizer and no weights: starts from random ones
dataset = "tiny_base"
prompt_weight = 0.1  # a problem's words are worth learning too; .3: 1,000 steps learn 69 instead of 79 %
out_dir = "out/tiny_base"
device = "cpu"
dtype = "float32"
max_seq_len = 128

batch_size = 16  # about 730 tokens: 7,000 steps reach 93 % of its own kinds, 3,500 of 32 examples 89 %
length_window = 1  # batches of short problems next to batches of long ones learn much worse
max_steps = 7000
learning_rate = 2e-3
lr_schedule = "linear"
decay_start = 0.5  # constant, then down to 0 over the second half
warmup_steps = 50
weight_decay = 0.05
beta2 = 0.99
eval_interval = 1000
save_interval = 1000
test_examples = 400  # of its own kinds
max_new_tokens = 48

lora_r = 0

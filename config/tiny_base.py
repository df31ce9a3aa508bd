# Remakes the embedded base from nothing: python train.py config/tiny_base.py. 6.3 M tokens: 44 minutes on one core,
# other jobs beside it. The same loop with lora_r = 0: all weights are trained, densely, and out_dir gets a whole
# checkpoint. Another architecture: copy data/tiny/untrained, edit its config.json, and give --model=COPY --out_dir=...

model = "data/tiny/untrained"  # a config.json, a tokenizer and no weights: starts from random ones
dataset = "tiny_base"
prompt_weight = 0.1  # a problem's words are worth learning too
out_dir = "out/tiny_base"
device = "cpu"
threads = 1
dtype = "float32"
max_seq_len = 256

batch_size = 16  # about 1,260 tokens
length_window = 1  # batches of short problems next to batches of long ones learn much worse
max_steps = 5000  # 92 % of its own kinds right
learning_rate = 2e-3
lr_schedule = "linear"
decay_start = 0.5  # constant, then down to 0 over the second half: 68 % after 3,000 steps, 94 after 5,000
warmup_steps = 50
weight_decay = 0.05
beta2 = 0.99
eval_interval = 1000
save_interval = 1000
test_examples = 400  # of its own kinds
max_new_tokens = 48

lora_r = 0

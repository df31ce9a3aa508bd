# What `python train.py` runs: an embedded base of 1.3 M parameters learns kinds of word problems that it has
# not seen. A CPU, no download, about two minutes on one core. Problems and base: data/tiny/prepare.py.

model = "data/tiny/base"
dataset = "tiny"
out_dir = "out/tiny"
device = "cpu"
threads = 1  # matrices this small gain little from a second, and lose everything on a busy machine
dtype = "float32"
max_seq_len = 128

batch_size = 32
length_window = 1  # random batches: by length, 76 % instead of 86 % right (one seed)
max_steps = 400
learning_rate = 5e-3  # high: the base is small, and what it adapts to is new
lr_schedule = "linear"
warmup_steps = 10
beta2 = 0.99
eval_interval = 100
eval_examples = 64
save_interval = 100
log_interval = 20
test_examples = 400
max_new_tokens = 48

lora_r = 16
lora_alpha = 32
lora_targets = "q,k,v,o,gate,up,down"

# tools/sensitivity.py on the fine-tuned base (results/sensitivity/tiny-finetuned-svd.txt): block 0's MLP
# costs +.19 at .9, those of blocks 1-4 at most .001 at .97, block 0's attention +3.1 at .5. The last block
# always runs dense: only its loss rows compute more than keys and values.
mlp_sparsity = {"1-4": 0.9}
dense_first = 0  # its texts are short and it has no attention sinks: results/README.md

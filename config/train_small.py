"""A run of a few seconds, to see that everything works: python train.py config/train_small.py"""

out_dir = "out-small"

# a tiny model
n_layer = 2
n_head = 2
n_embd = 64
block_size = 64
vocab_size = 512

# a short run
max_iters = 60
warmup_iters = 10
batch_size = 16
learning_rate = 3e-3
min_lr = 3e-4
eval_interval = 30
eval_iters = 5
log_interval = 10
sample_tokens = 60

"""The least there is, to try an idea on in seconds: python train.py config/unified_fast_prototype.py"""

out_dir = "out-unified-fast"

loss = "unified"
primary_loss_type = "standard"  # plain cross-entropy, and no component is on

# a tiny model
n_layer = 2
n_head = 2
n_embd = 64
block_size = 64
vocab_size = 512

# a short run
max_iters = 200
warmup_iters = 20
batch_size = 16
learning_rate = 3e-3
eval_interval = 100
eval_iters = 5
sample_tokens = 60

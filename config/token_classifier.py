"""Which tokens were replaced, about two minutes on 2 cores: python train.py config/token_classifier.py"""

out_dir = "out-classifier"

mode = "token_classifier"

# short pieces and short blocks, so that a small model soon learns what stands beside what
vocab_size = 512
block_size = 64
batch_size = 32

max_iters = 900
warmup_iters = 60
learning_rate = 2e-3
weight_decay = 0.1  # every block is corrupted anew, so there is little to learn by heart
eval_interval = 300
sample_tokens = 64

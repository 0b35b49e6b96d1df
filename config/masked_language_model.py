"""A masked language model, about two minutes on 2 cores: python train.py config/masked_language_model.py

Text and vocabulary are those of config/sequence_scorer.py, whose checkpoint can judge this model:
--loss_modifiers_enabled --judge_weight_modifier_enabled --judge_weight_checkpoint=out-scorer/checkpoint-900
"""

out_dir = "out-masked"

objective = "masked"

# short pieces and short blocks, so that a small model soon learns what stands beside what
vocab_size = 512
block_size = 64
batch_size = 32

max_iters = 900
warmup_iters = 60
learning_rate = 2e-3
weight_decay = 0.1  # every block is masked anew, so there is little to learn by heart
eval_interval = 300
sample_tokens = 64

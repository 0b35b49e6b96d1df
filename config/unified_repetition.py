"""Against a model that repeats itself: python train.py config/unified_repetition.py

Penalties as strong as it takes to change what is generated; perplexity pays for them. What they do was
measured in docs/components/repetition.md.
"""

out_dir = "out-unified-repetition"

loss = "unified"
primary_loss_type = "deepseek"

# every token of the window, not only what would complete a longer n-gram
use_ngram_penalty = True
ngram_size = 1
ngram_window_size = 100
ngram_penalty_weight = 4.0

use_immediate_repetition_penalty = True
immediate_repetition_weight = 1.0

eos_token_id = 0  # the end of text
min_sequence_length = 30  # not that early
eos_penalty_weight = 0.1

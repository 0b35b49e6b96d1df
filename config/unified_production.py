"""Everything of the unified loss that goes together: python train.py config/unified_production.py

The parts are in log.jsonl as loss/<part>: watch them for drift.
"""

out_dir = "out-unified-production"

loss = "unified"
primary_loss_type = "deepseek"
adaptive_temperature = True  # it follows how steady training is
temperature_bounds = (0.95, 1.05)  # what is trained at another temperature is evaluated at 1
label_smoothing = 0.05
z_loss = 1e-4  # keeps the logits from drifting

use_ngram_penalty = True
use_immediate_repetition_penalty = True
eos_token_id = 0  # the end of text
eos_penalty_weight = 0.02

use_mtp = True
num_future_tokens = 2
mtp_weight = 0.1
shared_projection = True

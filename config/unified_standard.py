"""The unified loss for a usual language model: python train.py config/unified_standard.py"""

out_dir = "out-unified-standard"

loss = "unified"
primary_loss_type = "deepseek"  # cross-entropy at a temperature
initial_temperature = 1.0
label_smoothing = 0.05

# what has just been said is a little less likely to be said again, where the text does not
use_ngram_penalty = True
use_immediate_repetition_penalty = True

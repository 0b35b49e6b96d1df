"""The default run with loss modifiers: python train.py config/loss_modifiers.py

Evaluation reports the unmodified loss, so its figures compare with the default run's.
"""

out_dir = "out-modifiers"

loss_modifiers_enabled = True  # the master switch

# more weight on samples whose wrong answers are concentrated
entropy_modifier_enabled = True
entropy_modifier_weight = 1.2
entropy_modifier_use_for_weighting = True
entropy_modifier_threshold = 0.1

# label smoothing
target_smoothing_enabled = True
target_smoothing_factor = 0.1
target_smoothing_special_tokens = [0, 1, 2]  # the special tokens are not smoothed

mask_ratio_weight_enabled = False

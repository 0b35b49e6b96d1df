"""Heads that predict the tokens after the next one: python train.py config/unified_mtp.py

They are trained with the model and saved in its checkpoints as lossmith_loss.pt; nothing else reads them.
"""

out_dir = "out-unified-mtp"

loss = "unified"
primary_loss_type = "adaptive_mtp"  # tokens weigh more the surer the prediction
adaptive_weight_range = (0.5, 1.5)

use_mtp = True
mtp_type = "adaptive"
num_future_tokens = 3
mtp_weight = 0.1
shared_projection = True  # the heads share the model's output matrix

"""A mixture of experts, kept in balance: python train.py config/unified_moe.py"""

out_dir = "out-unified-moe"

# in each layer four networks of the usual size, of which a token takes two
model = "moe"
num_experts = 4
moe_top_k = 2

loss = "unified"
primary_loss_type = "deepseek"
use_moe_balancing = True  # every expert is to be used
gradient_balance_weight = 0.05
router_z_loss_weight = 1e-3  # and no router to be too sure

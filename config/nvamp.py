"""More weight on tokens whose loss is unusual: python train.py config/nvamp.py

The loss is no negative log-likelihood; compare the evaluation's figures with other runs', which are plain.
"""

out_dir = "out-nvamp"

loss = "nvamp"
nvamp_alpha = 1.0  # the variance-aware part
nvamp_beta = 0.02  # plain cross-entropy
nvamp_gamma = 0.001  # the largest losses
nvamp_top_k = 4

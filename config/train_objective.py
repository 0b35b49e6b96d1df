"""The default run with options of the objective on: python train.py config/train_objective.py

Evaluation reports the plain negative log-likelihood, so its figures compare with the default run's.
"""

out_dir = "out-objective"

label_smoothing = 0.05  # a twentieth of the target goes to the other tokens
smoothing_mode = "exclude_target"
z_loss = 1e-4  # keeps the log-sum-exp near 0, and the logits from drifting
confidence_penalty = 0.01  # rewards entropy a little

"""The trainer: `lossmith train`, a model on real text from one command.

Read it in this order: `keys` and `loss_keys` (what can be set), `config` (where the values
come from), `objective` (the loss they describe), `corpus`, `data` and `corruption` (text to blocks of
tokens), `model`, `tasks` (what each mode trains), `loss_in_forward` and `loss_modifiers` (its loss),
`trainer`, `progress` and `trackers` (the loop and what it shows), `runner` (the story), `cli` (the door).
"""

"""The trainer: `lossmith train`, a model on real text from one command.

`cli` reads the command, `config` turns it into a checked configuration, and `run.runner` tells the story
from there: `data` reads text and cuts it into blocks, a class in `tasks` makes model, loss and measures of a
mode, and `run.trainer` trains with Hugging Face's Trainer.
"""

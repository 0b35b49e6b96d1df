"""The trainer: `lossmith train`, a model on real text from one command.

`cli` reads the command, `config` turns it into a checked configuration, and `run.runner` tells the story
from there: `data` reads text and cuts it into blocks, a class in `tasks` makes model, loss and measures of a
mode, and `run.trainer` trains with Hugging Face's Trainer.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from lossmith import Objective


def train(
    config_file: str | Path | None = None,
    *,
    objective: "Objective | str | None" = None,
    console: "Console | None" = None,
    **keys: Any,
) -> int:
    """Train a model, as `lossmith train` does, with a loss of your own if you like.

    Args:
        config_file: a file of assignments, or None.
        objective: an objective to train with, without modifiers, which have keys; or the key of that name.
        console: where to print; default: the terminal.
        keys: the trainer's keys, which win over the file's.

    Returns:
        0, or 128 plus the signal's number if a signal ended the run. With ``resume=True``, give the same
        objective again: its state is restored.

    Raises:
        UserError: something is missing or impossible; the message says what to do.

    Example:
        >>> import lossmith, lossmith.training
        >>> margin = lossmith.Term("margin", lambda s, batch: (s.top_wrong_logit - s.target_logit + 1).relu())
        >>> plain = lossmith.Term("cross_entropy", lambda s, batch: s.nll, reads=("nll",))
        >>> objective = lossmith.Objective([plain, margin])
        >>> lossmith.training.train(objective=objective, dataset="novel.txt")  # doctest: +SKIP
        0
    """
    from rich.console import Console

    from lossmith.training.config.own_loss import name_of
    from lossmith.training.config.reading import Setting, configured
    from lossmith.training.run.runner import run

    given = None if objective is None or isinstance(objective, str) else objective
    if given is not None:
        keys["loss"] = name_of(given)
    elif objective is not None:
        keys["objective"] = objective
    told = [Setting(name, value, name) for name, value in keys.items()]
    config = configured(None if config_file is None else Path(config_file), told)
    how = "lossmith.training.train(...), or lossmith train"
    return run(config, console or Console(), how, given)

"""Objectives in Hugging Face's models and Trainer.

``attach(model, loss)`` puts an objective inside a causal model's forward, ``detach(model)`` takes it out;
``compute_loss_func(loss)`` is for the Trainer's argument of that name; ``LossTrainer(loss=...)`` is a Trainer
that does all of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.integrations.huggingface.attachment import attach, detach
    from lossmith.integrations.huggingface.loss_function import compute_loss_func
    from lossmith.integrations.huggingface.trainer import LossTrainer

_HOMES = {
    "LossTrainer": "trainer",
    "attach": "attachment",
    "compute_loss_func": "loss_function",
    "detach": "attachment",
}

__all__ = ["LossTrainer", "attach", "compute_loss_func", "detach"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `attach` need not load the Trainer."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

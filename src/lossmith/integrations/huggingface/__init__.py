"""Objectives in Hugging Face's models and Trainer.

``attach(model, loss)`` puts an objective inside a causal model's forward, and ``detach(model)`` takes it out.
``compute_loss_func(loss)`` makes the Trainer's argument of that name. ``LossTrainer(loss=...)`` is a Trainer
that does all of this.
"""

from typing import TYPE_CHECKING, Any

from lossmith.integrations.huggingface.attachment import attach, detach
from lossmith.integrations.huggingface.labels import compute_loss_func

if TYPE_CHECKING:
    from lossmith.integrations.huggingface.trainer import LossTrainer

__all__ = ["LossTrainer", "attach", "compute_loss_func", "detach"]


def __getattr__(name: str) -> Any:
    """Import the Trainer on first use: `attach` does not need it."""
    if name != "LossTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lossmith.integrations.huggingface.trainer import LossTrainer

    return LossTrainer

"""Names that UnifiedLoss had before it was one; each is a UnifiedLoss with its options set."""

from __future__ import annotations

import warnings
from typing import Any

from lossmith.objectives.unified import UnifiedLoss


def _say(old: str, new: str) -> None:
    warnings.warn(f"{old} is UnifiedLoss({new}); use that", DeprecationWarning, stacklevel=3)


class DeepSeekLoss(UnifiedLoss):
    """``UnifiedLoss(primary_loss_type="deepseek")``.

    Args:
        vocab_size, hidden_size, options: of :class:`lossmith.UnifiedLoss`.
    """

    def __init__(self, vocab_size: int, hidden_size: int | None = None, **options: Any) -> None:
        _say("DeepSeekLoss", "vocab_size, hidden_size, primary_loss_type='deepseek'")
        super().__init__(vocab_size, hidden_size, "deepseek", **options)


class AdaptiveMTPLoss(UnifiedLoss):
    """``UnifiedLoss(primary_loss_type="adaptive_mtp")``.

    Args:
        vocab_size, hidden_size, options: of :class:`lossmith.UnifiedLoss`.
    """

    def __init__(self, vocab_size: int, hidden_size: int | None = None, **options: Any) -> None:
        _say("AdaptiveMTPLoss", "vocab_size, hidden_size, primary_loss_type='adaptive_mtp'")
        super().__init__(vocab_size, hidden_size, "adaptive_mtp", **options)


class AntiRepetitionLoss(UnifiedLoss):
    """``UnifiedLoss(use_ngram_penalty=True, use_immediate_repetition_penalty=True)``.

    Args:
        vocab_size, eos_token_id, pad_token_id, options: of :class:`lossmith.UnifiedLoss`.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> None:
        _say("AntiRepetitionLoss", "use_ngram_penalty=True, use_immediate_repetition_penalty=True, ...")
        options = {"use_ngram_penalty": True, "use_immediate_repetition_penalty": True, **options}
        super().__init__(vocab_size, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **options)

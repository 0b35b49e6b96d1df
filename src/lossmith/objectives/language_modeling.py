"""FundamentaLLM's loss and function: former names of cross-entropy."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor, nn

from lossmith.core.former_names import former
from lossmith.objectives.cross_entropy import CrossEntropyLoss
from lossmith.options import option, strict_options
from lossmith.options.shared import IgnoreIndex, LabelSmoothing

FormerReduction = Annotated[
    Literal["none", "mean", "sum", "batch", "batchmean"], option("how tokens are averaged")
]
ALSO_IGNORED = -1


class LanguageModelingLoss(nn.Module):
    """A former name: :class:`lossmith.CrossEntropyLoss`, with -1 ignored as well.

    Args:
        label_smoothing: share of the target's probability spread over all classes, in [0, 1).
        ignore_index: the id of ignored targets; -1 is ignored too.
        reduction: ``mean``, ``sum``, ``none``, or ``batch`` (= ``batchmean``), the mean loss of each sample.

    Raises:
        ValueError: an unknown reduction, or smoothing out of range.
    """

    @former("LanguageModelingLoss")
    @strict_options
    def __init__(
        self,
        label_smoothing: LabelSmoothing = 0.0,
        ignore_index: IgnoreIndex = -100,
        reduction: FormerReduction = "mean",
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction: FormerReduction = reduction

    @strict_options
    def forward(self, logits: Tensor, targets: Tensor, reduction: FormerReduction | None = None) -> Tensor:
        """The loss of logits [B, T, V] at targets [B, T]; ``reduction`` overrides the module's."""
        return _loss(logits, targets, reduction or self.reduction, self.label_smoothing, self.ignore_index)


@former("compute_loss")
@strict_options
def compute_loss(
    logits: Tensor,
    targets: Tensor,
    reduction: FormerReduction = "mean",
    label_smoothing: LabelSmoothing = 0.0,
    ignore_index: IgnoreIndex = -100,
) -> Tensor:
    """A former name: :func:`lossmith.cross_entropy`, with -1 ignored as well.

    Args:
        logits: [B, T, V].
        targets: [B, T] ids.
        reduction, label_smoothing, ignore_index: see :class:`lossmith.LanguageModelingLoss`.

    Example:
        >>> import torch, warnings, lossmith
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", DeprecationWarning)
        ...     loss = lossmith.compute_loss(torch.zeros(1, 2, 4), torch.tensor([[3, -1]]))
        >>> round(loss.item(), 4)
        1.3863
    """
    return _loss(logits, targets, reduction, label_smoothing, ignore_index)


def _loss(
    logits: Tensor, targets: Tensor, reduction: FormerReduction, label_smoothing: float, ignore_index: int
) -> Tensor:
    if logits.dim() != 3 or targets.dim() != 2:
        raise ValueError(
            f"logits must be [B, T, V] and targets [B, T]; got {list(logits.shape)} and {list(targets.shape)}"
        )
    targets = targets.masked_fill(targets == ALSO_IGNORED, ignore_index)
    of_samples = reduction in ("batch", "batchmean")
    criterion = CrossEntropyLoss(
        reduction="none" if of_samples else reduction,  # type: ignore[arg-type]
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    losses = criterion(logits, targets)
    if not of_samples:
        return losses
    return losses.sum(-1) / (targets != ignore_index).sum(-1).clamp(min=1)

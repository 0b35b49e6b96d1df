"""Training objectives of language models in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.batch import TokenBatch
    from lossmith.corpus_perplexity import Perplexity
    from lossmith.engine.stats import TokenStats
    from lossmith.equation import LossOutput, Term
    from lossmith.functional import cross_entropy, perplexity, ranking_loss, token_stats
    from lossmith.metrics import Metrics
    from lossmith.modifiers import (
        BaseLossModifier,
        EntropyModifier,
        LossModifierPipeline,
        MaskRatioWeightModifier,
        MetricsCollectorModifier,
        ModelMode,
        SequenceScorerCorrelationModifier,
        SequenceScorerVarianceModifier,
        SequenceScoringJudgeWeightModifier,
        TargetSmoothingModifier,
        create_loss_modifier_pipeline,
    )
    from lossmith.objective import Objective
    from lossmith.objectives.cross_entropy import CrossEntropyLoss

__version__ = "0.1.0"

_HOMES = {
    "BaseLossModifier": "modifiers.base",
    "CrossEntropyLoss": "objectives.cross_entropy",
    "EntropyModifier": "modifiers.entropy",
    "LossModifierPipeline": "modifiers.pipeline",
    "LossOutput": "equation",
    "MaskRatioWeightModifier": "modifiers.mask_ratio",
    "Metrics": "metrics",
    "MetricsCollectorModifier": "modifiers.metrics_collector",
    "ModelMode": "modifiers.base",
    "Objective": "objective",
    "Perplexity": "corpus_perplexity",
    "SequenceScorerCorrelationModifier": "modifiers.sequence_correlation",
    "SequenceScorerVarianceModifier": "modifiers.sequence_variance",
    "SequenceScoringJudgeWeightModifier": "modifiers.judge",
    "TargetSmoothingModifier": "modifiers.target_smoothing",
    "Term": "equation",
    "TokenBatch": "batch",
    "TokenStats": "engine.stats",
    "create_loss_modifier_pipeline": "modifiers.config",
    "cross_entropy": "functional",
    "perplexity": "functional",
    "ranking_loss": "functional",
    "token_stats": "functional",
}

__all__ = [
    "BaseLossModifier",
    "CrossEntropyLoss",
    "EntropyModifier",
    "LossModifierPipeline",
    "LossOutput",
    "MaskRatioWeightModifier",
    "Metrics",
    "MetricsCollectorModifier",
    "ModelMode",
    "Objective",
    "Perplexity",
    "SequenceScorerCorrelationModifier",
    "SequenceScorerVarianceModifier",
    "SequenceScoringJudgeWeightModifier",
    "TargetSmoothingModifier",
    "Term",
    "TokenBatch",
    "TokenStats",
    "create_loss_modifier_pipeline",
    "cross_entropy",
    "perplexity",
    "ranking_loss",
    "token_stats",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `lossmith --help` need not load PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lossmith' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"lossmith.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

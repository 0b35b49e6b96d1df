"""Training objectives of language models in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.batch import TokenBatch
    from lossmith.components.component import Component, Weighted
    from lossmith.components.contrastive import Contrastive
    from lossmith.components.diversity import ExpertDiversity
    from lossmith.components.moe import MoEBalance, RouterZLoss
    from lossmith.components.mtp import MTP
    from lossmith.components.repetition import EarlyEOS, ImmediateRepetition, NgramRepetition
    from lossmith.components.token_losses import ConfidenceCalibration, ConfidencePenalty, Focal, ZLoss
    from lossmith.corpus_perplexity import Perplexity
    from lossmith.engine.plan import Plan
    from lossmith.engine.stats import TokenStats
    from lossmith.equation import LossOutput, Term
    from lossmith.functional import cross_entropy, perplexity, ranking_loss, token_stats
    from lossmith.linear_functional import linear_cross_entropy, linear_token_stats
    from lossmith.metrics import Metrics
    from lossmith.modifiers.base import BaseLossModifier, ModelMode
    from lossmith.modifiers.config import create_loss_modifier_pipeline
    from lossmith.modifiers.entropy import EntropyModifier
    from lossmith.modifiers.judge import SequenceScoringJudgeWeightModifier
    from lossmith.modifiers.mask_ratio import MaskRatioWeightModifier
    from lossmith.modifiers.metrics_collector import MetricsCollectorModifier
    from lossmith.modifiers.pipeline import LossModifierPipeline
    from lossmith.modifiers.sequence_correlation import SequenceScorerCorrelationModifier
    from lossmith.modifiers.sequence_variance import SequenceScorerVarianceModifier
    from lossmith.modifiers.target_smoothing import TargetSmoothingModifier
    from lossmith.objective import Objective
    from lossmith.objectives.adaptive import AdaptiveCrossEntropyLoss
    from lossmith.objectives.composed import ComposedLoss
    from lossmith.objectives.cross_entropy import CrossEntropyLoss
    from lossmith.objectives.language_modeling import LanguageModelingLoss, compute_loss
    from lossmith.objectives.nvamp import NVAMPLoss
    from lossmith.objectives.renamed import AdaptiveMTPLoss, AntiRepetitionLoss, DeepSeekLoss
    from lossmith.objectives.unified import UnifiedLoss, create_unified_loss
    from lossmith.temperature import AdaptiveTemperature
    from lossmith.wrapped_objective import WrappedObjective

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveCrossEntropyLoss": "objectives.adaptive",
    "AdaptiveMTPLoss": "objectives.renamed",
    "AdaptiveTemperature": "temperature",
    "AntiRepetitionLoss": "objectives.renamed",
    "BaseLossModifier": "modifiers.base",
    "Component": "components.component",
    "ComposedLoss": "objectives.composed",
    "ConfidenceCalibration": "components.token_losses",
    "ConfidencePenalty": "components.token_losses",
    "Contrastive": "components.contrastive",
    "CrossEntropyLoss": "objectives.cross_entropy",
    "DeepSeekLoss": "objectives.renamed",
    "EarlyEOS": "components.repetition",
    "EntropyModifier": "modifiers.entropy",
    "ExpertDiversity": "components.diversity",
    "Focal": "components.token_losses",
    "ImmediateRepetition": "components.repetition",
    "LanguageModelingLoss": "objectives.language_modeling",
    "LossModifierPipeline": "modifiers.pipeline",
    "LossOutput": "equation",
    "MTP": "components.mtp",
    "MaskRatioWeightModifier": "modifiers.mask_ratio",
    "Metrics": "metrics",
    "MetricsCollectorModifier": "modifiers.metrics_collector",
    "MoEBalance": "components.moe",
    "ModelMode": "modifiers.base",
    "NVAMPLoss": "objectives.nvamp",
    "NgramRepetition": "components.repetition",
    "Objective": "objective",
    "Plan": "engine.plan",
    "Perplexity": "corpus_perplexity",
    "RouterZLoss": "components.moe",
    "SequenceScorerCorrelationModifier": "modifiers.sequence_correlation",
    "SequenceScorerVarianceModifier": "modifiers.sequence_variance",
    "SequenceScoringJudgeWeightModifier": "modifiers.judge",
    "TargetSmoothingModifier": "modifiers.target_smoothing",
    "Term": "equation",
    "TokenBatch": "batch",
    "TokenStats": "engine.stats",
    "UnifiedLoss": "objectives.unified",
    "Weighted": "components.component",
    "WrappedObjective": "wrapped_objective",
    "ZLoss": "components.token_losses",
    "compute_loss": "objectives.language_modeling",
    "create_loss_modifier_pipeline": "modifiers.config",
    "create_unified_loss": "objectives.unified",
    "cross_entropy": "functional",
    "linear_cross_entropy": "linear_functional",
    "linear_token_stats": "linear_functional",
    "perplexity": "functional",
    "ranking_loss": "functional",
    "token_stats": "functional",
}

__all__ = [
    "MTP",
    "AdaptiveCrossEntropyLoss",
    "AdaptiveMTPLoss",
    "AdaptiveTemperature",
    "AntiRepetitionLoss",
    "BaseLossModifier",
    "Component",
    "ComposedLoss",
    "ConfidenceCalibration",
    "ConfidencePenalty",
    "Contrastive",
    "CrossEntropyLoss",
    "DeepSeekLoss",
    "EarlyEOS",
    "EntropyModifier",
    "ExpertDiversity",
    "Focal",
    "ImmediateRepetition",
    "LanguageModelingLoss",
    "LossModifierPipeline",
    "LossOutput",
    "MaskRatioWeightModifier",
    "Metrics",
    "MetricsCollectorModifier",
    "MoEBalance",
    "ModelMode",
    "NVAMPLoss",
    "NgramRepetition",
    "Objective",
    "Perplexity",
    "Plan",
    "RouterZLoss",
    "SequenceScorerCorrelationModifier",
    "SequenceScorerVarianceModifier",
    "SequenceScoringJudgeWeightModifier",
    "TargetSmoothingModifier",
    "Term",
    "TokenBatch",
    "TokenStats",
    "UnifiedLoss",
    "Weighted",
    "WrappedObjective",
    "ZLoss",
    "compute_loss",
    "create_loss_modifier_pipeline",
    "create_unified_loss",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_token_stats",
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

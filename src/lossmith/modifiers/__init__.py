"""Loss modifiers: they weigh samples, put another loss in a token's place, or watch. One file each."""

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

__all__ = [
    "BaseLossModifier",
    "EntropyModifier",
    "LossModifierPipeline",
    "MaskRatioWeightModifier",
    "MetricsCollectorModifier",
    "ModelMode",
    "SequenceScorerCorrelationModifier",
    "SequenceScorerVarianceModifier",
    "SequenceScoringJudgeWeightModifier",
    "TargetSmoothingModifier",
    "create_loss_modifier_pipeline",
]

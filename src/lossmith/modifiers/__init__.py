"""Loss modifiers: they weigh samples, put another loss in a token's place, or watch. One file each."""

from lossmith.modifiers.base import BaseLossModifier, ModelMode
from lossmith.modifiers.config import create_loss_modifier_pipeline
from lossmith.modifiers.configured_modifier import ConfiguredModifier
from lossmith.modifiers.entropy import EntropyModifier
from lossmith.modifiers.judge import SequenceScoringJudgeWeightModifier
from lossmith.modifiers.mask_ratio import MaskRatioWeightModifier
from lossmith.modifiers.metrics_collector import MetricsCollectorModifier
from lossmith.modifiers.pipeline import LossModifierPipeline
from lossmith.modifiers.scorer_modifier import ScorerModifier
from lossmith.modifiers.sequence_correlation import SequenceScorerCorrelationModifier
from lossmith.modifiers.sequence_variance import SequenceScorerVarianceModifier
from lossmith.modifiers.target_smoothing import TargetSmoothingModifier
from lossmith.modifiers.token_modifier import Measured, TokenModifier

__all__ = [
    "BaseLossModifier",
    "ConfiguredModifier",
    "EntropyModifier",
    "LossModifierPipeline",
    "MaskRatioWeightModifier",
    "Measured",
    "MetricsCollectorModifier",
    "ModelMode",
    "ScorerModifier",
    "SequenceScorerCorrelationModifier",
    "SequenceScorerVarianceModifier",
    "SequenceScoringJudgeWeightModifier",
    "TargetSmoothingModifier",
    "TokenModifier",
    "create_loss_modifier_pipeline",
]

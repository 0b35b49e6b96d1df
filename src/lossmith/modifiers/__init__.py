"""Loss modifiers: they weigh samples, put another loss in a token's place, or watch. One file each."""

from lossmith.modifiers.base import BaseLossModifier, ModelMode
from lossmith.modifiers.config import create_loss_modifier_pipeline
from lossmith.modifiers.configured_modifier import ConfiguredModifier
from lossmith.modifiers.pipeline import LossModifierPipeline
from lossmith.modifiers.scores.correlation import SequenceScorerCorrelationModifier
from lossmith.modifiers.scores.scorer_modifier import ScorerModifier
from lossmith.modifiers.scores.variance import SequenceScorerVarianceModifier
from lossmith.modifiers.tokens.entropy import EntropyModifier
from lossmith.modifiers.tokens.judge import SequenceScoringJudgeWeightModifier
from lossmith.modifiers.tokens.mask_ratio import MaskRatioWeightModifier
from lossmith.modifiers.tokens.metrics_collector import MetricsCollectorModifier
from lossmith.modifiers.tokens.target_smoothing import TargetSmoothingModifier
from lossmith.modifiers.tokens.token_modifier import Measured, TokenModifier

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

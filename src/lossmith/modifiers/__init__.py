"""Loss modifiers: they weigh samples, replace the loss of tokens, or only measure. One file each."""

from lossmith.modifiers.base import BaseLossModifier as BaseLossModifier, ModelMode as ModelMode
from lossmith.modifiers.config import create_loss_modifier_pipeline as create_loss_modifier_pipeline
from lossmith.modifiers.configured_modifier import ConfiguredModifier as ConfiguredModifier
from lossmith.modifiers.pipeline import LossModifierPipeline as LossModifierPipeline
from lossmith.modifiers.scores.correlation import (
    SequenceScorerCorrelationModifier as SequenceScorerCorrelationModifier,
)
from lossmith.modifiers.scores.scorer_modifier import ScorerModifier as ScorerModifier
from lossmith.modifiers.scores.variance import (
    SequenceScorerVarianceModifier as SequenceScorerVarianceModifier,
)
from lossmith.modifiers.tokens.entropy import EntropyModifier as EntropyModifier
from lossmith.modifiers.tokens.judge import (
    SequenceScoringJudgeWeightModifier as SequenceScoringJudgeWeightModifier,
)
from lossmith.modifiers.tokens.mask_ratio import MaskRatioWeightModifier as MaskRatioWeightModifier
from lossmith.modifiers.tokens.metrics_collector import MetricsCollectorModifier as MetricsCollectorModifier
from lossmith.modifiers.tokens.target_smoothing import TargetSmoothingModifier as TargetSmoothingModifier
from lossmith.modifiers.tokens.token_modifier import Measured as Measured, TokenModifier as TokenModifier

"""What is public, and where it lives. `__init__.py` reads this list."""

from lossmith.components.component import Component as Component, Weighted as Weighted
from lossmith.components.contrastive import Contrastive as Contrastive
from lossmith.components.diversity import ExpertDiversity as ExpertDiversity
from lossmith.components.moe import MoEBalance as MoEBalance, RouterZLoss as RouterZLoss
from lossmith.components.mtp import MTP as MTP
from lossmith.components.repetition import (
    EarlyEOS as EarlyEOS,
    ImmediateRepetition as ImmediateRepetition,
    NgramRepetition as NgramRepetition,
)
from lossmith.components.token_losses import (
    ConfidenceCalibration as ConfidenceCalibration,
    ConfidencePenalty as ConfidencePenalty,
    Focal as Focal,
    ZLoss as ZLoss,
)
from lossmith.core.metrics import Metrics as Metrics
from lossmith.core.warm_up import warm_up as warm_up
from lossmith.engine.head.plan import Plan as Plan
from lossmith.engine.shards.layout import VocabShards as VocabShards
from lossmith.engine.shards.sequence import SequenceShards as SequenceShards
from lossmith.engine.shards.sharded import ShardedHead as ShardedHead, ShardedLogits as ShardedLogits
from lossmith.engine.statistics.stats import TokenStats as TokenStats
from lossmith.equation.batch import TokenBatch as TokenBatch
from lossmith.equation.output import LossOutput as LossOutput, Pull as Pull
from lossmith.equation.term import Term as Term
from lossmith.functional import (
    cross_entropy as cross_entropy,
    linear_cross_entropy as linear_cross_entropy,
    linear_token_stats as linear_token_stats,
    ranking_loss as ranking_loss,
    token_stats as token_stats,
)
from lossmith.modifiers.base import BaseLossModifier as BaseLossModifier, ModelMode as ModelMode
from lossmith.modifiers.config import create_loss_modifier_pipeline as create_loss_modifier_pipeline
from lossmith.modifiers.pipeline import LossModifierPipeline as LossModifierPipeline
from lossmith.modifiers.scores.correlation import (
    SequenceScorerCorrelationModifier as SequenceScorerCorrelationModifier,
)
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
from lossmith.objectives.adaptive import AdaptiveCrossEntropyLoss as AdaptiveCrossEntropyLoss
from lossmith.objectives.composed import ComposedLoss as ComposedLoss
from lossmith.objectives.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from lossmith.objectives.language_modeling import (
    LanguageModelingLoss as LanguageModelingLoss,
    compute_loss as compute_loss,
)
from lossmith.objectives.nvamp import NVAMPLoss as NVAMPLoss
from lossmith.objectives.objective import Objective as Objective
from lossmith.objectives.renamed import (
    AdaptiveMTPLoss as AdaptiveMTPLoss,
    AntiRepetitionLoss as AntiRepetitionLoss,
    DeepSeekLoss as DeepSeekLoss,
)
from lossmith.objectives.temperature import AdaptiveTemperature as AdaptiveTemperature
from lossmith.objectives.unified import UnifiedLoss as UnifiedLoss, create_unified_loss as create_unified_loss
from lossmith.objectives.wrapped import WrappedObjective as WrappedObjective
from lossmith.perplexities import Perplexity as Perplexity, perplexity as perplexity

__version__: str

"""Training objectives of language models in PyTorch."""

from lossmith.batch import TokenBatch
from lossmith.engine.stats import TokenStats
from lossmith.functional import cross_entropy, perplexity, ranking_loss, token_stats
from lossmith.objective import LossOutput, Metrics, Objective, Term
from lossmith.objectives.cross_entropy import CrossEntropyLoss
from lossmith.perplexity import Perplexity

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "LossOutput",
    "Metrics",
    "Objective",
    "Perplexity",
    "Term",
    "TokenBatch",
    "TokenStats",
    "cross_entropy",
    "perplexity",
    "ranking_loss",
    "token_stats",
]

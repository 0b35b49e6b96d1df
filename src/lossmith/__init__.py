"""Training objectives of language models in PyTorch."""

from lossmith.batch import TokenBatch
from lossmith.corpus_perplexity import Perplexity
from lossmith.engine.stats import TokenStats
from lossmith.functional import cross_entropy, perplexity, ranking_loss, token_stats
from lossmith.metrics import Metrics
from lossmith.objective import LossOutput, Objective, Term
from lossmith.objectives.cross_entropy import CrossEntropyLoss

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

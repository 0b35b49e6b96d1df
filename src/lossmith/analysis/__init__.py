"""What a model knows of a text, in numbers: small functions of per-token statistics.

``token_table`` keeps what one sweep of the vocabulary says of every supervised token; the other functions
take its columns, or tensors of your own.
"""

from lossmith.analysis.calibration import Reliability, reliability
from lossmith.analysis.corpus import CorpusLoss, bits_per_byte, initial_gap
from lossmith.analysis.experts import expert_usage, usage_entropy
from lossmith.analysis.repetition import rep_l, seq_rep_n
from lossmith.analysis.tokens import (
    Bands,
    TokenTable,
    hardest,
    joined,
    loss_by_frequency,
    loss_by_position,
    token_table,
)

__all__ = [
    "Bands",
    "CorpusLoss",
    "Reliability",
    "TokenTable",
    "bits_per_byte",
    "expert_usage",
    "hardest",
    "initial_gap",
    "joined",
    "loss_by_frequency",
    "loss_by_position",
    "reliability",
    "rep_l",
    "seq_rep_n",
    "token_table",
    "usage_entropy",
]

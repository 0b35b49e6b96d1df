"""Options that several signatures share: the meaning and the values of each, declared once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from torch import Tensor

from lossmith.options.kinds import option

# ── targets and how they count ───────────────────────────────────────────────────────────────────

IgnoreIndex = Annotated[int, option("the target id of tokens without one")]
Shift = Annotated[
    bool | int,
    option("whether targets are unshifted labels, as Hugging Face has them; or by how many steps", low=0),
]
Mask = Annotated[Tensor | None, option("0 where a target does not count")]
TokenWeight = Annotated[
    Tensor | None,
    option("what each token's loss is multiplied by", dtype="real", advice="What is 0 or 1 is a mask"),
]
ClassWeight = Annotated[
    Tensor | None,
    option("what tokens of each class count for", dtype="floating", shape="[V]", finite=True, low=0),
]
Candidates = Annotated[Tensor | None, option("further ids to read the logits of; -1 where there is none")]

# ── how the logits are read ──────────────────────────────────────────────────────────────────────

# The smallest divisor of logits: below it ordinary logits overflow fp32, or pass -1e30, which masks a class.
LOWEST_DIVISOR, HIGHEST_DIVISOR = 1e-20, 1e20
Temperature = Annotated[
    float | Tensor,
    option(
        "divides the logits inside the loss",
        low=LOWEST_DIVISOR,
        high=HIGHEST_DIVISOR,
        shape="[]",
        dtype="real",
    ),
]
Softcap = Annotated[
    float | None,
    option("c of c tanh(z / c), which the logits become", low=LOWEST_DIVISOR, high=HIGHEST_DIVISOR),
]

# ── cross-entropy ────────────────────────────────────────────────────────────────────────────────

LabelSmoothing = Annotated[float, option("share of the target that is given to other tokens", low=0, below=1)]
SpecialTokens = Annotated[Sequence[int], option("ids of targets that are not smoothed", low=0)]
ZLossCoefficient = Annotated[float, option("weight of the squared log-sum-exp")]
FocalGamma = Annotated[float, option("exponent of the focal loss; 0 is plain cross-entropy", low=0)]
ConfidencePenaltyCoefficient = Annotated[float, option("weight of the negative entropy")]

# ── components ───────────────────────────────────────────────────────────────────────────────────

TemperatureBounds = Annotated[
    tuple[float, float],
    option("the lowest and the highest temperature", low=LOWEST_DIVISOR, high=HIGHEST_DIVISOR),
]
VocabSize = Annotated[int, option("V, the size of the vocabulary", low=1)]
HiddenSize = Annotated[int | None, option("D, the width of the hidden states", low=1)]
TokenId = Annotated[int, option("id of a token", low=0, advice="Of several, pass the one that is meant")]
ConfidenceThreshold = Annotated[float, option("the confidence whose weight is 1", above=0, below=1)]
WeightRange = Annotated[tuple[float, float], option("the weights of confidence 0 and 1", low=0)]
NumFutureTokens = Annotated[int, option("how many such heads, each a token further", low=1)]
SharedProjection = Annotated[bool, option("let the heads share the model's own output matrix")]
NgramSize = Annotated[int, option("n; 1 is every token of the window", low=1)]
NgramWindow = Annotated[int, option("how many tokens it looks back; at least n", low=1)]
RepetitionThreshold = Annotated[int, option("equal tokens in a row after which another one costs", low=1)]
MinLength = Annotated[int, option("supervised tokens before which an end is early", low=0)]
NumExperts = Annotated[int, option("experts that a router chooses from", low=1)]
ExpertsPerToken = Annotated[int | None, option("experts that a token is sent to; None is 1", low=1)]
NumRouters = Annotated[int | None, option("how many routers there are; None is one", low=1)]
ExpertUsage = Annotated[
    float | Sequence[float] | None,
    option("share of each expert, a list that sums to 1; None is the same for all"),
]
BalanceMode = Annotated[
    Literal["loss", "bias"], option("balance by a loss, or by a bias on the choice of experts")
]
PairTemperature = Annotated[float, option("temperature of the cosines of two views", above=0)]
CosineMargin = Annotated[float, option("cosines above 1 minus this cost something", low=0)]
FocalAlpha = Annotated[float, option("multiplies the focal loss")]

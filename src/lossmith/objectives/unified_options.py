"""The values that each flag of ``UnifiedLoss`` can take, and one line on what it is for."""

from __future__ import annotations

from typing import Annotated, Literal

from lossmith.options import option
from lossmith.options.shared import LOWEST_DIVISOR, NgramWindow, TokenId

PrimaryLossType = Annotated[
    Literal["standard", "deepseek", "adaptive_mtp"],
    option(
        "the main loss: cross-entropy, with a temperature, or weighted by the confidence of the prediction"
    ),
]
MTPType = Annotated[
    Literal["deepseek", "adaptive"],
    option("whether every token counts the same in their loss, or by confidence"),
]
FocalMode = Annotated[
    Literal["add", "replace"], option("the focal loss beside the main one, or in its place")
]
InitialTemperature = Annotated[
    float, option("temperature of a `deepseek` main loss, or where it begins", low=LOWEST_DIVISOR)
]
AdaptiveTemperature = Annotated[bool, option("let the temperature follow how steady training is")]
UseMTP = Annotated[bool, option("train heads that predict tokens further ahead")]
MTPWeight = Annotated[float, option("weight of the loss of these heads")]
UseNgramPenalty = Annotated[bool, option("penalise what would complete an n-gram again")]
NgramPenaltyWeight = Annotated[float, option("weight of the n-gram penalty")]
NgramWindowSize = Annotated[NgramWindow, option("how many tokens it looks back; at least `ngram_size`")]
UseImmediateRepetitionPenalty = Annotated[bool, option("penalise the token that has just been repeated")]
ImmediateRepetitionWeight = Annotated[float, option("weight of that penalty")]
EosTokenId = Annotated[
    TokenId | None, option("id of the end of text, which then costs something early; None is off")
]
PadTokenId = Annotated[TokenId | None, option("id of targets that do not count; None for none")]
EosPenaltyWeight = Annotated[float, option("weight of the penalty on an early end")]
UseMoEBalancing = Annotated[bool, option("even out which experts the routers use")]
GradientBalanceWeight = Annotated[float, option("weight of the balance")]
RouterZLossWeight = Annotated[float, option("weight of the routers' squared log-sum-exp")]
UseFocalLoss = Annotated[bool, option("add a focal loss, or put it in place of the main one")]
FocalWeight = Annotated[float, option("weight of the focal loss beside the main one")]
UseDiversityLoss = Annotated[bool, option("keep experts apart, by their outputs")]
DiversityWeight = Annotated[float, option("weight of the diversity loss")]
UseContrastiveLoss = Annotated[bool, option("keep the last hidden states of a block apart")]
ContrastiveWeight = Annotated[float, option("weight of the contrastive loss")]
UseAuxiliaryLoss = Annotated[bool, option("reward entropy")]
AuxiliaryWeight = Annotated[float, option("weight of the reward of entropy")]
TrackStatistics = Annotated[bool, option("keep means of the parts")]

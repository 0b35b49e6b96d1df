"""Former names: those that users of nano_gpt and FundamentaLLM know, and what replaces them here.

This is the only table. An option in it works, with a DeprecationWarning, or is refused with a message that
says what to write. `docs/migration/` lists them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lossmith.core.warn_user import warn_user

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Former:
    """The replacement of a former option.

    Attributes:
        write: what to write now, a name or in words.
        new: the option's name here; None if there is no such option.
        convert: former value -> value here; None if it is the same.
        always: for an option that no longer exists, the one value that asks for what is always done now.
    """

    write: str
    new: str | None = None
    convert: Callable[[Any], Any] | None = None
    always: Any = None


def renamed(new: str) -> Former:
    """The same value under another name."""
    return Former(new, new)


def _complement(value: Any) -> Any:
    """1 - value; anything but a number is returned as it is, to be refused by name."""
    return 1 - value if isinstance(value, int | float) and not isinstance(value, bool) else value


CONFIGURATION = "create_loss_modifier_pipeline"
OF_EACH_SAMPLE = "nothing: weights are always of each sample"

# Owner of the option -> its former name -> its replacement.
OPTIONS: Mapping[str, Mapping[str, Former]] = {
    "EntropyModifier": {"entropy_threshold": renamed("threshold")},
    "TargetSmoothingModifier": {
        "smoothing_factor": renamed("factor"),
        "special_token_ids": renamed("special_tokens"),
        "padding_token_id": renamed("padding_token"),
    },
    "MaskRatioWeightModifier": {"use_sequence_level": Former(OF_EACH_SAMPLE, always=True)},
    "SequenceScoringJudgeWeightModifier": {
        "judge_weight_checkpoint": renamed("checkpoint"),
        "judge_weight_exponent": renamed("exponent"),
        "judge_weight_min_factor": renamed("min_factor"),
        "judge_weight_max_factor": renamed("max_factor"),
        "judge_weight_eps": renamed("eps"),
    },
    "SequenceScorerVarianceModifier": {
        "sequence_variance_scale": renamed("scale"),
        "sequence_variance_alpha": renamed("alpha"),
        "sequence_variance_eps": renamed("eps"),
        "sequence_variance_mode": Former("scale and alpha, of the ratio of both variances"),
    },
    "SequenceScorerCorrelationModifier": {
        "sequence_correlation_alpha": renamed("alpha"),
        "sequence_correlation_eps": renamed("eps"),
    },
    "MetricsCollectorModifier": {
        "ema_alpha": Former("ema_decay = 1 - ema_alpha", "ema_decay", _complement),
        "collect_sequence_scorer_aare": Former("enabled=False to measure nothing", always=True),
    },
    CONFIGURATION: {
        "seq_scorer_log_abs_rel_err": renamed("metrics_collector_enabled"),
        "sequence_metrics_ema_alpha": Former(
            "metrics_collector_ema_decay = 1 - sequence_metrics_ema_alpha",
            "metrics_collector_ema_decay",
            _complement,
        ),
        "sequence_metrics_eps": renamed("metrics_collector_eps"),
        "mask_ratio_weight_sequence_level": Former(OF_EACH_SAMPLE, always=True),
        "sequence_variance_mode": Former(
            "sequence_variance_scale and sequence_variance_alpha, of the ratio of both variances"
        ),
    },
}

# Former methods and functions -> their replacements.
CALLS: Mapping[str, str] = {
    "is_enabled": "the attribute enabled",
    "set_temporarily_disabled": "`with pipeline.temporarily_disabled():`",
    "is_temporarily_disabled": "is_empty()",
    "LanguageModelingLoss": "CrossEntropyLoss",
    "compute_loss": "cross_entropy",
}

PER_SAMPLE = (
    "reduction='sequence_mean' for the mean over samples, or for the mean loss of each sample "
    "`losses = cross_entropy(logits, targets, reduction='none')` and "
    "`losses.sum(-1) / (targets != -100).sum(-1).clamp(min=1)`"
)
# Former reductions -> their replacements.
REDUCTIONS: Mapping[str, str] = {"batch": PER_SAMPLE, "batchmean": PER_SAMPLE}


def say_former(old: str, write: str) -> None:
    """Warn that ``old`` is a former name, and say what to write now."""
    warn_user(f"{old} is a former name; write {write}", DeprecationWarning)


def former(name: str) -> Callable[[F], F]:
    """Let a function that ``CALLS`` lists under ``name`` warn at each call and say what to write now."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def saying(*args: Any, **kwargs: Any) -> Any:
            say_former(f"{name}()", CALLS[name])
            return function(*args, **kwargs)

        return saying  # type: ignore[return-value]

    return decorate

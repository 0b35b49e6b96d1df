"""What a run's numbers say in words: pure functions from what was logged so far to a sentence or None.

Losses are noisy, so every threshold is far from what a healthy run does: a finding that is late is better
than a false alarm.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

PARTS = "loss/"  # the prefix of parts in the log
WINDOW = 5  # logged steps whose mean is taken, and over which a part has to dominate
LONG = 20  # logged steps that are enough to call something constant
CLAMPED = 10  # logged steps in a row with a weight at its limit


@dataclass(frozen=True)
class Limit:
    """A metric of a modifier, the value that its weights are clamped to, and the key that sets it."""

    metric: str
    value: float
    key: str


@dataclass
class History:
    """The numbers that a run has logged so far.

    Attributes:
        max_steps: how many steps are planned.
        limits: what weights are clamped to.
        steps: the rows of training steps whose loss is a number.
        evaluations: the rows of evaluations over the same data, with a number as loss.
        losses: the loss of each of ``steps``.
        noise: the median change of the loss from one row to the next, over the last rows.
        lowest: the lowest mean of `WINDOW` losses in a row.
    """

    max_steps: int
    limits: tuple[Limit, ...] = ()
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    noise: float = 0.0
    lowest: float = math.inf

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row of `log.jsonl`; rows of other kinds, and losses that are no number, are passed over."""
        if is_number(row.get("val_loss")):
            # The closing evaluation covers other data than those during training, and is not compared.
            if not self.evaluations or size_of(row) == size_of(self.evaluations[0]):
                self.evaluations.append(dict(row))
        elif is_number(row.get("loss")):
            self.steps.append(dict(row))
            self.losses.append(row["loss"])
            last = self.losses[-10 * LONG :]
            self.noise = median([abs(b - a) for a, b in pairwise(last)] or [0.0])
            if len(self.losses) >= WINDOW:
                self.lowest = min(self.lowest, fmean(self.losses[-WINDOW:]))

    @property
    def step(self) -> int:
        """The last logged step."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def parts(self) -> list[str]:
        """The parts of the loss; the first is the objective itself."""
        return [key for key in self.steps[-1] if key.startswith(PARTS)] if self.steps else []

    @property
    def scale(self) -> float:
        """The size of the first loss, to which changes are compared."""
        return abs(self.losses[0]) if self.losses else 0.0

    def mean_loss(self, after: int, until: int) -> float | None:
        """The mean loss of the rows in a range of steps; None if it has none."""
        found = [row["loss"] for row in self.steps if after < row["step"] <= until]
        return fmean(found) if found else None


def find(history: History) -> Iterator[tuple[str, str]]:
    """Everything that is found now, each as a name that stays the same and a sentence."""
    whole = {"over-fitting": over_fitting, "divergence": divergence, "plateau": plateau}
    for name, finder in whole.items():
        if said := finder(history):
            yield name, said
    for part in history.parts:
        if said := dominates(history, part):
            yield f"dominates:{part}", said
        if said := does_nothing(history, part):
            yield f"does nothing:{part}", said
    for limit in history.limits:
        if said := at_its_clamp(history, limit):
            yield f"clamp:{limit.metric}", said


# ── from the losses ───────────────────────────────────────────────────────────────────────────────


def over_fitting(history: History) -> str | None:
    """Two evaluations in a row are worse than the best one while the training loss has fallen."""
    found = history.evaluations
    if len(found) < 3:
        return None
    best = min(range(len(found)), key=lambda i: found[i]["val_loss"])
    if best > len(found) - 3:
        return None
    lowest, margin = found[best]["val_loss"], 0.02 * max(history.scale, abs(found[0]["val_loss"]))
    before, last = (row["val_loss"] for row in found[-2:])
    if before < lowest + margin / 2 or last < lowest + margin:
        return None
    step = found[best]["step"]
    begin = found[best - 1]["step"] if best else 0
    then = history.mean_loss(begin, step)
    now = history.mean_loss(found[-2]["step"], found[-1]["step"])
    if then is None or now is None or now > then - margin / 2:
        return None
    return (
        f"Over-fitting: since step {step} the validation loss has risen from {lowest:.3f} to {last:.3f} "
        f"while the training loss has fallen from {then:.3f} to {now:.3f}. Train for fewer steps, on more "
        "text or with more weight decay."
    )


def divergence(history: History) -> str | None:
    """The mean of the last losses is far above the lowest mean so far, by more than noise explains."""
    if len(history.losses) < 2 * WINDOW:
        return None
    now = fmean(history.losses[-WINDOW:])
    if now - history.lowest < max(0.2 * history.scale, 4 * history.noise):
        return None
    return (
        f"Divergence: the training loss is {now:.3f} over the last {WINDOW} logged steps, after a lowest of "
        f"{history.lowest:.3f}. Lower learning_rate, warm up for longer, or keep grad_clip on."
    )


def plateau(history: History) -> str | None:
    """The loss has not moved for two fifths of the logged steps, and the learning rate is still high."""
    num = max(LONG, 2 * len(history.losses) // 5)
    if len(history.losses) < num:
        return None
    rows, losses = history.steps[-num:], history.losses[-num:]
    rates = [row.get("learning_rate") or 0.0 for row in rows]
    if min(rates) < 0.5 * max(rates) or not max(rates):  # warming up, or coming to its end
        return None
    earlier, later = losses[: num // 2], losses[num // 2 :]
    fall = fmean(earlier) - fmean(later)
    error = math.sqrt(4 / num) * history.noise  # of the difference of the two means
    if abs(fall) + 2 * error > 0.003 * history.scale or fmean(later) < 0.05 * history.scale:
        return None
    return (
        f"Plateau: the training loss has stayed at {fmean(later):.3f} since step {rows[0]['step']}, at a "
        "high learning rate. Another learning_rate or a larger model may take it further; a loss that never "
        "fell hints at a mistake in the data or the loss."
    )


# ── from the parts and the weights ────────────────────────────────────────────────────────────────


def dominates(history: History, part: str) -> str | None:
    """A part that is added to the objective makes up more than nine tenths of it."""
    if part == history.parts[0] or len(history.steps) < WINDOW:
        return None
    shares = [abs(shares_of(row).get(part, 0.0)) for row in history.steps[-WINDOW:]]
    if min(shares) <= 0.9:
        return None
    return (
        f"{part} makes up {fmean(shares):.0%} of the loss, so that little else is learned. Lower its weight."
    )


def does_nothing(history: History, part: str) -> str | None:
    """A part has been exactly 0 for long."""
    rows = history.steps[-LONG:]
    if len(rows) < LONG or rows[-1]["step"] - rows[0]["step"] < history.max_steps / 10:
        return None
    if any(row.get(part) != 0 for row in rows):
        return None
    return f"{part} has been exactly 0 since step {rows[0]['step']} or before: it does nothing. Leave it out."


def at_its_clamp(history: History, limit: Limit) -> str | None:
    """A weight has been at its limit in every logged step for a while."""
    values = [row[limit.metric] for row in history.steps[-CLAMPED:] if is_number(row.get(limit.metric))]
    if len(values) < CLAMPED or not all(math.isclose(value, limit.value, rel_tol=1e-5) for value in values):
        return None
    return (
        f"{limit.metric} has been at its limit, {limit.key}={limit.value:g}, for {CLAMPED} logged steps: the "
        "limit decides what these samples weigh. Move it, or weigh less strongly."
    )


# ── before the first step ─────────────────────────────────────────────────────────────────────────


def too_small_a_text(num_tokens: int, num_parameters: int, num_drawn: int) -> str | None:
    """The text has few tokens for the model, and a run goes through it many times.

    Args:
        num_tokens: length of the training text.
        num_parameters: of the model.
        num_drawn: how many tokens the whole run trains on.
    """
    passes = num_drawn / max(num_tokens, 1)
    if passes < 20 or num_tokens >= num_parameters / 50:
        return None
    return (
        f"the text is small: {num_tokens:,} tokens for {num_parameters:,} parameters, read {passes:,.0f} "
        "times. The model will learn it by heart. Use more text, a smaller model or fewer steps."
    )


def far_from_knowing_nothing(first: float, nothing: float, margin: float) -> str | None:
    """The untrained model's loss is not that of a model that knows nothing."""
    if math.isfinite(first) and abs(first - nothing) <= margin:
        return None
    return (
        f"are more than {margin} apart. An untrained model should know nothing; "
        "look at the initialisation and at the loss."
    )


# ── shared ────────────────────────────────────────────────────────────────────────────────────────


def shares_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Each part's share of the parts' sizes, negative for one that lowers the loss; {} without numbers."""
    parts = {key: value for key, value in row.items() if key.startswith(PARTS)}
    if not all(is_number(value) for value in parts.values()):
        return {}
    size = sum(abs(value) for value in parts.values())
    return {key: value / size for key, value in parts.items()} if size else {}


def size_of(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Over how much an evaluation went."""
    return row.get("val_tokens"), row.get("val_sequences")


def is_number(value: Any) -> bool:
    """Whether a value of the log is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

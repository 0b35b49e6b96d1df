"""Every objective over hidden states is the objective over their logits: total, parts, metrics, gradients."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import linear_case
import lossmith
from linear_case import IGNORE, ROWS, STRATEGIES, D, Head, V
from lossmith import (
    AdaptiveCrossEntropyLoss,
    AdaptiveTemperature,
    ComposedLoss,
    CrossEntropyLoss,
    EntropyModifier,
    LossModifierPipeline,
    LossOutput,
    MaskRatioWeightModifier,
    MetricsCollectorModifier,
    NVAMPLoss,
    Objective,
    SequenceScoringJudgeWeightModifier,
    TargetSmoothingModifier,
    Term,
    UnifiedLoss,
    Weighted,
)

B, T, E = 3, 12, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Squares(lossmith.Component):
    """Reads the statistics afterwards, with a gradient."""

    reads = ("logsumexp", "nll")

    def scalar(self, inputs, output):
        return (output.stats.logsumexp**2 * output.batch.valid).sum() / output.batch.num_tokens

    def token_sum(self, inputs, output):
        return (output.stats.nll**2 * output.batch.scale).sum()


class Halved(lossmith.BaseLossModifier):
    def modify_loss(self, logits, targets, loss, per_position_loss, **kwargs):
        return {"per_position_loss": per_position_loss / 2 + 0.01 * logits.logsumexp(-1)}


class Tripled(lossmith.BaseLossModifier):
    def modify_loss(self, logits, targets, loss, **kwargs):
        return 3 * loss


def judge(ids: Tensor) -> Tensor:
    """Finds large ids wrong."""
    return ids.double().mean(-1) / V


def before(batch: lossmith.TokenBatch) -> Tensor:
    ids = batch.rows(batch.targets).roll(1, 1).reshape(-1, 1)
    return torch.where((ids == IGNORE) | (ids == batch.targets.unsqueeze(1)), -1, ids)


MARGIN = Term("margin", lambda s, b: (s.top_wrong_logit - s.target_logit + 1).relu(), 0.3)
SURE = Term("sure", lambda s, b: s.nll * s.entropy, token_weight=lambda s, b: s.top_prob)
HARD = Term("hard", lambda s, b: s.nll, token_weight=lambda s, b: s.nll / s.nll.max(), scope="batch")
AGAIN = Term("again", lambda s, b: -s.candidate_log1m_prob.sum(-1), 0.5, candidates=before)
OFF = Term("off", lambda s, b: s.nll, 0.0, scope="batch")


def modified(*modifiers: Any, **options: Any) -> Callable[[], LossModifierPipeline]:
    return lambda: LossModifierPipeline([make() for make in modifiers], **options)


MODIFIERS: dict[str, Callable[[], Any]] = {
    "entropy": lambda: EntropyModifier({}),
    "smoothing": lambda: TargetSmoothingModifier({"factor": 0.1}),
    "mask_ratio": lambda: MaskRatioWeightModifier({}),
    "collector": lambda: MetricsCollectorModifier({}),
    "judge": lambda: SequenceScoringJudgeWeightModifier({"judge": judge}),
    "halved": lambda: Halved({}),
    "tripled": lambda: Tripled({}),
}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "cross_entropy": lambda: CrossEntropyLoss(label_smoothing=0.1, z_loss=0.1, confidence_penalty=0.2),
    "focal": lambda: CrossEntropyLoss(focal_gamma=1.5, z_loss=0.1, temperature=0.7, softcap=9.0),
    "weighted": lambda: CrossEntropyLoss(class_weight=torch.linspace(0.5, 2, V).double(), z_loss=0.1),
    "shifted": lambda: CrossEntropyLoss(shift=True, reduction="sequence_mean"),
    "none": lambda: CrossEntropyLoss(reduction="none", z_loss=0.1),
    "adaptive_temperature": lambda: CrossEntropyLoss(temperature=AdaptiveTemperature(1.3)),
    "adaptive": lambda: AdaptiveCrossEntropyLoss(threshold=0.3, label_smoothing=0.1),
    "nvamp": lambda: NVAMPLoss(gamma=0.5, top_k=3),
    "nvamp_legacy": lambda: NVAMPLoss(gamma=0.5, legacy=True, shift=True),
    "terms": lambda: Objective([SURE, MARGIN, AGAIN, OFF]),
    "batch_terms": lambda: Objective([HARD, MARGIN], temperature=0.8),
    "all_off": lambda: Objective([OFF]),
    "no_terms": lambda: Objective([]),
    "composed": lambda: ComposedLoss(
        CrossEntropyLoss(label_smoothing=0.1), {"squares": Weighted(Squares(), 0.3)}
    ),
    "deepseek": lambda: UnifiedLoss(V, primary_loss_type="deepseek", initial_temperature=1.2),
    "pipeline_empty": modified(base=CrossEntropyLoss(z_loss=0.1)),
    "pipeline_nvamp": modified(*(MODIFIERS[n] for n in ("smoothing", "entropy")), base=NVAMPLoss()),
    **{f"modifier_{name}": modified(make) for name, make in MODIFIERS.items()},
    **{
        f"modifiers_{'_'.join(names)}": modified(*(MODIFIERS[n] for n in names))
        for names in itertools.combinations(("entropy", "smoothing", "judge", "halved"), 2)
    },
    "modifiers_all": modified(*MODIFIERS.values(), base=CrossEntropyLoss(z_loss=0.1)),
}
UNIFIED = {
    "mtp": {"use_mtp": True, "hidden_size": D},
    "mtp_shared": {"use_mtp": True, "hidden_size": D, "shared_projection": True},
    "mtp_adaptive": {"use_mtp": True, "hidden_size": D, "mtp_type": "adaptive", "num_future_tokens": 2},
    "repetition": {"use_ngram_penalty": True, "ngram_size": 2, "use_immediate_repetition_penalty": True},
    "eos": {"eos_token_id": 2, "min_sequence_length": 6},
    "moe": {"use_moe_balancing": True, "num_experts": E, "router_z_loss_weight": 0.01},
    "focal": {"use_focal_loss": True},
    "focal_replace": {"use_focal_loss": True, "focal_mode": "replace"},
    "contrastive": {"use_contrastive_loss": True},
    "auxiliary": {"use_auxiliary_loss": True, "z_loss": 0.01},
    "adaptive": {"primary_loss_type": "adaptive_mtp"},
}
UNIFIED["everything"] = {
    key: value for flags in UNIFIED.values() for key, value in flags.items() if key != "focal_mode"
}


def batch() -> tuple[Head, Tensor]:
    targets = linear_case.targets(B, T)
    targets[1, 3:8] = 3
    return linear_case.head(B, T), targets


def extras(criterion: Objective) -> dict[str, Any]:
    """What the objective takes besides, with gradients."""
    rng = torch.Generator().manual_seed(5)
    given = {
        "gate_logits": torch.randn(B, T, E, generator=rng, dtype=torch.float64, requires_grad=True),
        "confidence_scores": torch.rand(B, T, generator=rng, dtype=torch.float64, requires_grad=True),
    }
    return {name: value for name, value in given.items() if name in criterion.input_names}


def both(make: Callable[[], Objective], rows: int | None, strategy: str) -> tuple[Any, ...]:
    """(leaves, output over the head, output over its logits)."""
    torch.manual_seed(0)
    criterion = make().double()
    other = copy.deepcopy(criterion)
    for ours, theirs in zip(criterion.parameters(), other.parameters(), strict=True):
        theirs.data = ours.data
    head, targets = batch()
    inputs = extras(criterion)
    leaves = [*head.leaves, *inputs.values()]
    torch.manual_seed(1)  # the judge's draws
    fused = criterion.evaluate(targets=targets, **head.inputs(rows, strategy), **inputs)
    torch.manual_seed(1)
    of_components = {name: value for name, value in head.inputs().items() if name in criterion.input_names}
    plain = other.evaluate(head.logits(), targets, **of_components, **inputs)
    return leaves, list(criterion.parameters()), list(other.parameters()), fused, plain


def assert_gradients(
    ours: Tensor, theirs: Tensor, leaves: list[Tensor], own: list[Tensor], others: list[Tensor]
) -> None:
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = [
        torch.autograd.grad(value, leaves + params, upstream, retain_graph=True, allow_unused=True)
        if value.requires_grad
        else [None] * (len(leaves) + len(params))
        for value, params in ((ours, own), (theirs, others))
    ]
    for our, their in zip(*found, strict=True):
        nothing = next(torch.zeros_like(g) for g in (our, their, torch.zeros(())) if g is not None)
        torch.testing.assert_close(
            nothing if our is None else our, nothing if their is None else their, **CLOSE
        )


def check(make: Callable[[], Objective], rows: int | None, strategy: str) -> None:
    leaves, own, others, fused, plain = both(make, rows, strategy)
    torch.testing.assert_close(fused.total, plain.total, **CLOSE)
    assert list(fused.parts) == list(plain.parts)
    torch.testing.assert_close(fused.parts, plain.parts, **CLOSE)
    torch.testing.assert_close(fused.contributions, plain.contributions, **CLOSE)
    torch.testing.assert_close(fused.metrics.to_dict(), plain.metrics.to_dict(), **CLOSE)
    with torch.no_grad():
        assert torch.equal(fused.stats.predicted, plain.stats.predicted)
    pairs = [(fused.total, plain.total)]
    names = list(plain.parts)
    pairs += [(fused.parts[name], plain.parts[name]) for name in names]
    pairs += [(fused.total + 0.5 * fused.parts[n], plain.total + 0.5 * plain.parts[n]) for n in names[:1]]
    if len(names) > 1:
        pairs.append(tuple(of.parts[names[0]] - 2 * of.parts[names[-1]] for of in (fused, plain)))
    for ours, theirs in pairs:
        assert_gradients(ours, theirs, leaves, own, others)
    if plain.stats is not None and not isinstance(make(), LossModifierPipeline):
        of_stats = [of.stats.nll.square().sum() + of.stats.entropy.sum() for of in (fused, plain)]
        assert_gradients(*of_stats, leaves, own, others)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name, strategy, rows):
    check(OBJECTIVES[name], rows, strategy)


@pytest.mark.parametrize("rows", [3, None])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", UNIFIED)
def test_unified_loss(name, strategy, rows):
    check(lambda: UnifiedLoss(V, label_smoothing=0.1, **UNIFIED[name]), rows, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["cross_entropy", "terms", "composed", "adaptive", "nvamp"])
def test_a_sum_of_everything_is_one_backward(name, strategy):
    """Total, parts and statistics in one graph, without retaining it."""
    leaves, own, others, fused, plain = both(OBJECTIVES[name], 3, strategy)
    found = []
    for output, params in ((fused, own), (plain, others)):
        value = output.total * 0.7 + sum(output.parts.values()) + (output.stats.nll**2).mean()
        found.append(torch.autograd.grad(value, leaves + params, allow_unused=True))
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("names", [["cross_entropy"], ["z_loss"], ["z_loss", "confidence_penalty"]])
def test_parts_have_their_gradient_also_when_metrics_were_read_before(names):
    head, targets = batch()
    found = []
    for given in (head.inputs(3), {"logits": head.logits()}):
        output = OBJECTIVES["cross_entropy"]().evaluate(targets=targets, **given)
        with torch.no_grad():
            output.metrics.to_dict()
            _ = output.stats.logsumexp, output.stats.nll, output.stats.entropy
        output.total.backward(retain_graph=True)
        for leaf in head.leaves:
            leaf.grad = None
        found.append(torch.autograd.grad(sum(output.parts[name] for name in names), head.leaves))
    torch.testing.assert_close(*found, **CLOSE)


def test_unified_loss_by_its_forward():
    head, targets = batch()
    criterion = UnifiedLoss(V, label_smoothing=0.1, use_focal_loss=True, shift=True).double()
    found = []
    for given in ({"logits": head.logits()}, head.inputs(3)):
        parts = criterion(targets=targets, return_detailed=True, **given)
        gradients = torch.autograd.grad(parts["main_loss"] + 0.3 * parts["focal_loss"], head.leaves)
        found.append((parts, gradients))
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("rows", [2, None])
def test_pipelines_by_modify_loss(rows):
    """With the caller's reduced loss and the caller's loss of each position, too."""
    head, targets = batch()
    per_position = torch.rand(B, T, dtype=torch.float64, requires_grad=True)
    for modifiers in ([], [MODIFIERS["entropy"]()], [MODIFIERS["collector"]()]):
        pipeline = LossModifierPipeline(modifiers)
        for options in ({}, {"per_position_loss": per_position}, {"loss": per_position.mean()}):
            found = []
            for given in ({"logits": head.logits()}, head.inputs(rows)):
                loss = pipeline.modify_loss(targets=targets, **given, **options)
                gradients = torch.autograd.grad(
                    loss, (*head.leaves, per_position), allow_unused=True, retain_graph=True
                )
                found.append((loss, gradients, pipeline.get_all_metrics()))
            ours, theirs = found
            torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
            torch.testing.assert_close(ours[2], theirs[2], **CLOSE)
            for one, other in zip(ours[1], theirs[1], strict=True):
                torch.testing.assert_close(
                    torch.zeros(()) if one is None else one,
                    torch.zeros(()) if other is None else other,
                    **CLOSE,
                )


def test_the_statistics_of_the_output_are_those_of_the_logits():
    head, targets = batch()
    criterion = CrossEntropyLoss(temperature=0.7, z_loss=0.1)
    fused: LossOutput = criterion.evaluate(targets=targets, **head.inputs(2))
    plain = criterion.evaluate(head.logits(), targets)
    for ours, theirs in ((fused.stats, plain.stats), (fused.stats.unscaled, plain.stats.unscaled)):
        for name in ("nll", "target_prob", "top_prob", "wrong_entropy", "mean_logit", "num_wrong", "correct"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **CLOSE)
        torch.testing.assert_close(
            torch.autograd.grad(ours.top_prob.sum(), head.leaves, retain_graph=True),
            torch.autograd.grad(theirs.top_prob.sum(), head.leaves, retain_graph=True),
            **CLOSE,
        )

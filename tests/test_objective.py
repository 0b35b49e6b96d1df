"""The equation: parts that sum to the loss, detached weights, one pass each way, nothing waits."""

import pytest
import torch
from torch import Tensor

import lossmith
from lossmith import Objective, Term

IGNORE, B, T, V = -100, 3, 4, 6
REDUCTIONS = ["mean", "sequence_mean", "sum", "none"]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(B, T, V, generator=rng)).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, T), generator=rng)
    targets[0, 1:3], targets[2, 0] = IGNORE, IGNORE
    return logits, targets


def next_ids(batch: lossmith.TokenBatch) -> Tensor:
    return ((batch.targets + 1).clamp(min=0) % V).unsqueeze(-1)


def top_and_none(batch: lossmith.TokenBatch) -> Tensor:
    return torch.stack([torch.zeros_like(batch.targets), torch.full_like(batch.targets, -1)], -1)


NLL = Term("nll", lambda s, b: s.nll)
MARGIN = Term("margin", lambda s, b: (1 + s.top_wrong_logit - s.target_logit).relu(), 0.5)
WEIGHTED = Term("weighted", lambda s, b: s.nll * s.entropy, 0.3, token_weight=lambda s, b: 1 - s.target_prob)
UNLIKELY = Term("unlikely", lambda s, b: -s.candidate_log1m_prob.sum(-1), 0.2, candidates=next_ids)
OTHER = Term("other", lambda s, b: -s.candidate_log1m_prob.sum(-1), 0.1, candidates=top_and_none)
ALL = [NLL, MARGIN, WEIGHTED, UNLIKELY, OTHER]


# -- parts and total ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parts_sum_to_the_total(reduction):
    logits, targets = batch(torch.float64)
    scalars = {"router": torch.tensor(0.7, dtype=torch.float64)} if reduction != "none" else None
    output = Objective(ALL, reduction=reduction).evaluate(logits, targets, scalars=scalars)
    assert list(output.parts) == [t.name for t in ALL] + list(scalars or {})
    torch.testing.assert_close(output.total, torch.stack(list(output.parts.values())).sum(0))
    assert output.num_tokens.item() == B * T - 3
    assert output.as_dict().keys() == {*output.parts, "total_loss"}
    assert output.as_dict()["total_loss"] is output.total


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_part_is_the_term_alone(reduction):
    logits, targets = batch(torch.float64)
    together = Objective(ALL, reduction=reduction).evaluate(logits, targets)
    for term in ALL:
        alone = Objective([term], reduction=reduction).evaluate(logits, targets)
        torch.testing.assert_close(together.parts[term.name], alone.total)
        ours, theirs = (
            torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]
            for x in (together.parts[term.name], alone.total)
        )
        torch.testing.assert_close(ours, theirs)


def test_each_terms_value_is_its_formula():
    logits, targets = batch(torch.float64)
    valid = targets != IGNORE
    p = logits.softmax(-1)
    y = targets.clamp(min=0).unsqueeze(-1)
    p_y = p.gather(-1, y).squeeze(-1)
    entropy = -(p * p.log()).sum(-1)
    wrong = logits.scatter(-1, y, -torch.inf).amax(-1)
    p_next = p.gather(-1, (y + 1) % V).squeeze(-1)
    expected = {
        "nll": -p_y.log(),
        "margin": 0.5 * (1 + wrong - logits.gather(-1, y).squeeze(-1)).relu(),
        "weighted": 0.3 * (1 - p_y).detach() * -p_y.log() * entropy,
        "unlikely": -0.2 * (1 - p_next).log(),
        "other": -0.1 * (1 - p[..., 0]).log(),
    }
    parts = Objective(ALL).evaluate(logits, targets).parts
    for name, values in expected.items():
        truth = torch.where(valid, values, 0.0).sum() / valid.sum()
        torch.testing.assert_close(parts[name], truth, msg=name)
        gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (parts[name], truth)]
        torch.testing.assert_close(*gradients, msg=name)


def test_no_terms_at_all_is_a_zero():
    logits, targets = batch()
    output = Objective([]).evaluate(logits, targets)
    assert output.total.item() == 0
    assert output.parts == {}


def test_a_tensor_coefficient_is_honoured_and_differentiated():
    logits, targets = batch()
    coefficient = torch.tensor(0.25, requires_grad=True)
    total = Objective([Term("nll", lambda s, b: s.nll, coefficient)])(logits, targets)
    plain = lossmith.cross_entropy(logits, targets)
    torch.testing.assert_close(total, plain * 0.25)
    total.backward()
    torch.testing.assert_close(coefficient.grad, plain.detach())


# -- weights ------------------------------------------------------------------------------------


def test_weights_see_statistics_without_gradients_and_get_none():
    logits, targets = batch()
    seen = []

    def weight(stats: lossmith.TokenStats, _: lossmith.TokenBatch) -> Tensor:
        seen.append(stats.nll.requires_grad or stats.candidate_logits.requires_grad)
        return stats.nll

    term = Term("t", lambda s, b: s.entropy, token_weight=weight, candidates=next_ids)
    (gradient,) = torch.autograd.grad(Objective([term])(logits, targets), logits)
    assert seen
    assert not any(seen)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    valid = targets != IGNORE
    nll = torch.where(valid, lossmith.cross_entropy(logits, targets, reduction="none"), 0.0).detach()
    (expected,) = torch.autograd.grad((entropy * nll).sum() / valid.sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_a_weight_may_be_a_scalar_of_the_batch():
    logits, targets = batch()
    term = Term("t", lambda s, b: s.nll, token_weight=lambda s, b: s.nll.mean(), scope="batch")
    expected = lossmith.cross_entropy(logits, targets)
    values = lossmith.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(Objective([term])(logits, targets), expected * values.mean().detach())


def test_an_infinite_loss_of_weight_zero_is_zero():
    logits = torch.tensor([[0.0, -torch.inf], [0.0, 1.0]], requires_grad=True)
    term = Term("t", lambda s, b: s.nll, token_weight=lambda s, b: b.targets == 0)
    loss = Objective([term], reduction="sum")(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(loss, lossmith.cross_entropy(logits[1:], torch.tensor([0])))
    loss.backward()
    assert torch.equal(logits.grad[0], torch.zeros(2))


def test_what_a_term_makes_of_ignored_positions_does_not_matter():
    logits, targets = batch()
    broken = Term("t", lambda s, b: torch.where(b.valid, s.nll, torch.nan))
    for reduction in REDUCTIONS:
        loss = Objective([broken], reduction=reduction)(logits, targets)
        assert torch.equal(loss, lossmith.cross_entropy(logits, targets, reduction=reduction))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all()
        assert torch.equal(gradient[targets == IGNORE], torch.zeros(3, V))


# -- off is absent -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_coefficient_of_zero_is_never_called_and_changes_no_bit(reduction):
    def fail(*_: object) -> Tensor:
        raise AssertionError("a term that is off was evaluated")

    logits, targets = batch()
    off = Term("off", fail, 0.0, token_weight=fail, candidates=fail)
    results = []
    for terms in ([NLL, MARGIN], [off, NLL, off, MARGIN]):
        output = Objective(terms, reduction=reduction).evaluate(logits, targets)
        results.append((output.total, torch.autograd.grad(output.total.sum(), logits)[0]))
        assert list(output.parts) == ["nll", "margin"]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_plain_cross_entropy_is_the_objective_of_one_term():
    logits, targets = batch()
    for a, b in ((Objective([NLL]), lossmith.CrossEntropyLoss()),):
        assert torch.equal(a(logits, targets), b(logits, targets))


# -- candidates ----------------------------------------------------------------------------------


def test_every_term_sees_its_own_candidates_only():
    logits, targets = batch()
    seen = {}

    def record(name: str):
        def loss(stats: lossmith.TokenStats, _: lossmith.TokenBatch) -> Tensor:
            seen[name] = stats.candidate_logits
            return stats.candidate_logits.clamp(min=-9).sum(-1)

        return loss

    terms = [
        Term("a", record("a"), candidates=next_ids),
        NLL,
        Term("b", record("b"), candidates=top_and_none),
        Term("c", record("c"), candidates=next_ids, token_weight=lambda s, b: s.candidate_logits.squeeze(-1)),
    ]
    Objective(terms).evaluate(logits, targets)
    valid = (targets != IGNORE).reshape(-1)
    flat = logits.detach().reshape(-1, V)
    expected = flat.gather(-1, (targets.reshape(-1, 1) + 1).clamp(min=0) % V)[valid]
    assert torch.equal(seen["a"][valid], expected)
    assert torch.equal(seen["c"][valid], expected)
    assert torch.equal(seen["b"][valid, 0], flat[valid, 0])
    assert (seen["b"][:, 1] == -torch.inf).all()


# -- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 5.0}], ids=str)
def test_all_terms_together_are_one_pass_each_way(options, count_ops):
    logits, targets = batch()
    unscaled = Term("z", lambda s, b: s.unscaled.logsumexp**2 + s.num_wrong * s.mean_logit, 0.01)
    with count_ops as ops:
        Objective([*ALL, unscaled], **options)(logits, targets).backward()
    assert ops.passes == (1, 1)


def test_the_family_is_one_pass_each_way(count_ops):
    logits, targets = batch()
    with count_ops as ops:
        lossmith.cross_entropy(
            logits,
            targets,
            label_smoothing=0.1,
            z_loss=0.1,
            focal_gamma=2.0,
            confidence_penalty=0.1,
            temperature=2.0,
        ).backward()
    assert ops.passes == (1, 1)


SYNCHRONISING = ["item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu"]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "softcap": 9.0, "reduction": "sequence_mean"}], ids=str
)
def test_a_training_step_never_waits_for_the_device(monkeypatch, options):
    logits, targets = batch()
    family = lossmith.CrossEntropyLoss(
        label_smoothing=0.1,
        special_tokens=(1,),
        z_loss=0.1,
        focal_gamma=2.0,
        class_weight=torch.ones(V),
        **options,
    )
    inputs = {"mask": torch.ones(B, T), "token_weight": torch.ones(B, T), "denominator": torch.tensor(9)}
    inputs["mask"] = inputs["mask"].bool()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor's value was read on the host")

    with monkeypatch.context() as patch:
        for name in SYNCHRONISING:
            patch.setattr(torch.Tensor, name, refuse)
        for objective in (Objective(ALL, **options), family):
            output = objective.evaluate(logits, targets, **inputs)
            output.total.backward()
        metrics = output.metrics
    assert set(metrics) >= {"loss", "nll", "perplexity", "accuracy"}


# -- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_metrics_are_those_of_the_plain_model(reduction):
    logits, targets = batch()
    objective = lossmith.CrossEntropyLoss(
        label_smoothing=0.2, temperature=0.5, z_loss=0.1, reduction=reduction
    )
    output = objective.evaluate(logits, targets)
    valid = targets != IGNORE
    nll = torch.nn.functional.cross_entropy(logits[valid].double(), targets[valid]).item()
    accuracy = (logits.argmax(-1) == targets)[valid].float().mean().item()
    assert output.metrics["nll"] == pytest.approx(nll, rel=1e-6)
    assert output.metrics["perplexity"] == pytest.approx(torch.tensor(nll).exp().item(), rel=1e-5)
    assert output.metrics["accuracy"] == pytest.approx(accuracy)
    assert output.metrics["loss"] == pytest.approx(output.total.sum().item())
    assert output.metrics["z_loss"] == pytest.approx(output.parts["z_loss"].sum().item())
    assert output.metrics.to_dict() == pytest.approx({name: output.metrics[name] for name in output.metrics})
    assert all(isinstance(value, float) for value in output.metrics.to_dict().values())
    with pytest.raises(KeyError):
        output.metrics["acuracy"]


def test_metrics_of_nothing_are_finite():
    logits, targets = batch()
    metrics = lossmith.CrossEntropyLoss().evaluate(logits, torch.full_like(targets, IGNORE)).metrics
    assert metrics.to_dict() == {"loss": 0, "cross_entropy": 0, "nll": 0, "perplexity": 1, "accuracy": 0}


def test_metrics_may_be_read_after_backward_and_cost_nothing_unread(count_ops):
    logits, targets = batch()
    with count_ops as ops:
        output = Objective([NLL]).evaluate(logits, targets)
        output.total.backward()
    assert ops.passes == (1, 1)
    assert 0 <= output.metrics["accuracy"] <= 1


# -- calling it ----------------------------------------------------------------------------------


def test_forward_knows_the_names_that_trainers_use():
    logits, targets = batch()
    objective, mask = lossmith.CrossEntropyLoss(), torch.arange(T).expand(B, T) > 0
    assert torch.equal(
        objective(logits, targets, attention_mask=mask, num_items_in_batch=20),
        objective(logits, targets, mask=mask, denominator=20),
    )
    detailed = objective(logits, targets, return_detailed=True)
    assert torch.equal(detailed["total_loss"], objective(logits, targets))
    # both: one for the targets, one for what components make of other tensors
    both = objective(logits, targets, mask=mask, attention_mask=torch.ones_like(mask))
    assert torch.equal(both, objective(logits, targets, mask=mask))
    with pytest.raises(TypeError, match="num_items_in_batch is another name of denominator"):
        objective(logits, targets, denominator=3, num_items_in_batch=3)


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("class_weight", [None, torch.linspace(0.5, 2.0, V)], ids=["plain", "weighted"])
def test_scalars_take_this_micro_batchs_share(class_weight, reduction):
    logits, targets = batch(torch.float64)
    scalar = torch.tensor(2.0, requires_grad=True, dtype=torch.float64)
    objective = lossmith.CrossEntropyLoss(class_weight=class_weight, reduction=reduction)
    whole = objective.evaluate(logits, targets, scalars={"aux": scalar})
    assert whole.parts["aux"].item() == 2.0
    weight = torch.ones(V) if class_weight is None else class_weight
    denominator = weight.double()[targets[targets != IGNORE]].sum() if reduction == "mean" else B
    parts = [
        objective.evaluate(
            logits[i : i + 1], targets[i : i + 1], denominator=denominator, scalars={"aux": scalar}
        )
        for i in range(B)
    ]
    torch.testing.assert_close(sum(p.total for p in parts), whole.total)
    torch.testing.assert_close(sum(p.parts["aux"] for p in parts), scalar)
    (gradient,) = torch.autograd.grad(sum(p.total for p in parts), scalar)
    assert gradient.item() == pytest.approx(1.0)


def test_an_objective_is_a_module_that_can_be_printed_and_copied():
    import copy

    objective = lossmith.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
    assert "label_smoothing=0.1" in repr(objective)
    logits, targets = batch()
    assert torch.equal(copy.deepcopy(objective)(logits, targets), objective(logits, targets))

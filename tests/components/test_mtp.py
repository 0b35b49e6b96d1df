"""Multi-token prediction against a loop over heads and positions."""

import pytest
import torch

from lossmith import (
    MTP,
    ComposedLoss,
    CrossEntropyLoss,
    LossModifierPipeline,
    MaskRatioWeightModifier,
    UnifiedLoss,
    Weighted,
    token_stats,
)
from reference_components import confidence_weight, further_ahead as naive, scale_of

IGNORE = -100
B, T, D, V, K = 2, 7, 5, 6, 3


def batch(dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(B, T, V, generator=rng, dtype=dtype, requires_grad=True)
    hidden = torch.randn(B, T, D, generator=rng, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (B, T), generator=rng)
    targets[0, 2], targets[1, 5:] = IGNORE, IGNORE
    return logits, hidden, targets


def composed(mtp: MTP, weight: float = 0.4, **options) -> ComposedLoss:
    return ComposedLoss(CrossEntropyLoss(**options), {"mtp": Weighted(mtp.double(), weight)})


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("has_segments", [False, True])
def test_value_and_gradients_are_those_of_the_loop(shared, has_segments):
    logits, hidden, targets = batch()
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 2, 2]]) if has_segments else None
    mtp = MTP(V, D, num_future_tokens=K, shared_projection=shared)
    criterion = composed(mtp)
    part = criterion.evaluate(logits, targets, hidden_states=hidden, segment_ids=segments).parts["mtp"]
    heads = [mtp.predict(k, hidden.reshape(-1, D), None).logits().reshape(B, T, V) for k in range(K)]
    scale = torch.full((B, T), 1.0 / (targets != IGNORE).sum().item(), dtype=torch.float64)
    expected = 0.4 * naive(heads, targets, scale, segments)
    torch.testing.assert_close(part, expected)
    wanted = [hidden, *mtp.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(part, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


def test_the_main_loss_is_not_touched_and_the_total_adds_up():
    logits, hidden, targets = batch()
    criterion = composed(MTP(V, D))
    output = criterion.evaluate(logits, targets, hidden_states=hidden)
    torch.testing.assert_close(output.total, CrossEntropyLoss()(logits, targets) + output.parts["mtp"])


def test_one_unembedding_is_really_shared():
    independent, shared = (
        MTP(V, D, num_future_tokens=K),
        MTP(V, D, num_future_tokens=K, shared_projection=True),
    )
    assert sum(p.numel() for p in independent.parameters()) == K * V * D
    assert sum(p.numel() for p in shared.parameters()) == K * (D * D + D) + V * D
    logits, hidden, targets = batch()
    unembedding = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    part = (
        composed(shared)
        .evaluate(logits, targets, hidden_states=hidden, lm_head_weight=unembedding)
        .parts["mtp"]
    )
    part.backward()
    assert unembedding.grad.any()
    assert shared.unembedding.weight.grad is None


@pytest.mark.parametrize("is_given", [False, True])
def test_a_shared_head_is_the_unembedding_of_the_transformed_states(is_given):
    """hidden + A hidden + b, so that a head that has learned nothing makes the model's own prediction."""
    logits, hidden, targets = batch()
    mtp = MTP(V, D, num_future_tokens=K, shared_projection=True)
    criterion = composed(mtp)
    unembedding = torch.randn(V, D, dtype=torch.float64) if is_given else mtp.unembedding.weight
    heads = [(hidden + hidden @ own.weight.t() + own.bias) @ unembedding.t() for own in mtp.heads]
    given = {"lm_head_weight": unembedding} if is_given else {}
    part = criterion.evaluate(logits, targets, hidden_states=hidden, **given).parts["mtp"]
    torch.testing.assert_close(part, 0.4 * naive(heads, targets, scale_of(targets)))


@pytest.mark.parametrize("shared", [False, True])
def test_hidden_states_where_no_head_has_a_target_go_nowhere(shared):
    """NaN there would be in the gradient of every transform, as 0 * NaN."""
    logits, hidden, _ = batch()
    targets = torch.full((B, T), IGNORE)
    targets[:, 3:5] = 1  # the heads look at these from positions 0 to 3
    mtp = MTP(V, D, num_future_tokens=K, shared_projection=shared)
    criterion = composed(mtp)
    padded = hidden.detach().clone()
    padded[:, 4:] = torch.nan
    padded.requires_grad_()
    found, expected = (
        criterion.evaluate(logits, targets, hidden_states=states).parts["mtp"] for states in (padded, hidden)
    )
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, [padded, *mtp.parameters()])
    wanted = torch.autograd.grad(expected, [hidden, *mtp.parameters()])
    torch.testing.assert_close(gradients, wanted)
    assert not gradients[0][:, 4:].any()


def test_confidence_scores_are_constants_to_the_heads():
    """Else a confidence head would lower the loss by lowering itself."""
    logits, hidden, targets = batch()
    scores = torch.rand(B, T, dtype=torch.float64, requires_grad=True)
    criterion = composed(MTP(V, D, num_future_tokens=2, adaptive=True))
    part = criterion.evaluate(logits, targets, hidden_states=hidden, confidence_scores=scores).parts["mtp"]
    assert torch.autograd.grad(part, scores, allow_unused=True) == (None,)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_confidence_is_that_of_the_untempered_prediction(temperature):
    logits, hidden, targets = batch()
    targets[0, 2], targets[1, 5:] = 1, 2
    mtp = MTP(V, D, num_future_tokens=1, adaptive=True)
    part = composed(mtp, temperature=temperature).evaluate(logits, targets, hidden_states=hidden).parts["mtp"]
    weight = confidence_weight(logits.softmax(-1).amax(-1).detach())
    heads = [hidden @ mtp.heads[0].weight.t()]
    torch.testing.assert_close(part, 0.4 * naive(heads, targets, scale_of(targets), weight=weight))


def test_each_target_counts_at_its_own_scale():
    logits, hidden, targets = batch()
    token_weight = torch.rand(B, T, dtype=torch.float64)
    mtp = MTP(V, D, num_future_tokens=2)
    criterion = composed(mtp)
    part = criterion.evaluate(logits, targets, hidden_states=hidden, token_weight=token_weight).parts["mtp"]
    heads = [hidden @ head.weight.t() for head in mtp.heads]
    torch.testing.assert_close(part, 0.4 * naive(heads, targets, scale_of(targets) * token_weight))


def test_the_models_own_heads():
    logits, _, targets = batch()
    given = [torch.randn(B, T, V, dtype=torch.float64, requires_grad=True) for _ in range(K)]
    scale = torch.full((B, T), 1.0 / (targets != IGNORE).sum().item(), dtype=torch.float64)
    expected = 0.4 * naive(given, targets, scale)
    for heads in (given, torch.stack(given)):
        part = composed(MTP(V, num_future_tokens=K)).evaluate(logits, targets, additional_logits=heads)
        torch.testing.assert_close(part.parts["mtp"], expected)


def test_confidence_weights():
    logits, hidden, targets = batch()
    mtp = MTP(V, D, num_future_tokens=2, adaptive=True, threshold=0.4, weight_range=(0.2, 1.8))
    heads = [mtp.double().predict(k, hidden.reshape(-1, D), None).logits().reshape(B, T, V) for k in range(2)]
    scale = torch.full((B, T), 1.0 / (targets != IGNORE).sum().item(), dtype=torch.float64)
    top = logits.softmax(-1).amax(-1).detach()
    scores = torch.rand(B, T, dtype=torch.float64)
    for given, c in ((None, top), (scores, scores)):
        weight = torch.where(c <= 0.4, 0.2 + 0.8 * c / 0.4, 1 + 0.8 * (c - 0.4) / 0.6)
        part = (
            composed(mtp)
            .evaluate(logits, targets, hidden_states=hidden, confidence_scores=given)
            .parts["mtp"]
        )
        torch.testing.assert_close(part, 0.4 * naive(heads, targets, scale, weight=weight))


@pytest.mark.parametrize("options", [{"use_mtp": True, "mtp_type": "adaptive"}, {"use_mtp": True}])
@pytest.mark.parametrize("of_head", [False, True])
def test_confidence_at_a_position_whose_own_target_is_missing(options, of_head, count_ops):
    """Where a prompt ends, the prediction is there although nothing of it is learned."""
    primary = "deepseek" if "mtp_type" in options else "adaptive_mtp"
    targets = torch.full((1, 14), IGNORE)
    targets[:, 10:] = 3
    hidden, unembedding = torch.zeros(1, 14, D), torch.zeros(50, D, requires_grad=True)
    given = {"lm_head_weight": unembedding} if of_head else {"logits": torch.zeros(1, 14, 50)}
    losses = {}
    for name, kind in (("plain", {"use_mtp": True}), ("adaptive", options)):
        criterion = UnifiedLoss(50, D, primary if kind is options else "deepseek", **kind)
        with count_ops as ops:
            output = criterion.evaluate(targets=targets, hidden_states=hidden, **given)
        losses[name] = output.parts["mtp_loss"].item()
    assert losses["adaptive"] / losses["plain"] == pytest.approx(0.5 + 0.5 * 0.02 / 0.7)  # at p = 1/50
    if not of_head:
        assert ops.passes[0] == 2  # one for each of the two objectives
    # where nothing is learned the statistics that come out are blank all the same
    assert output.stats.nll.shape == targets.shape
    assert not output.stats.top_prob[targets == IGNORE].sub(1).any()


def test_given_statistics_lack_those_positions():
    logits, hidden, targets = batch()
    pipeline = LossModifierPipeline(
        [MaskRatioWeightModifier({})], base=composed(MTP(V, D, num_future_tokens=2, adaptive=True))
    )
    stats = token_stats(logits, targets)
    with pytest.raises(ValueError, match=r"positions without a target.*leave stats out"):
        pipeline.modify_loss(logits, targets, stats=stats, hidden_states=hidden)


@pytest.mark.parametrize("adaptive", [False, True])
def test_nothing_flows_to_the_main_prediction_and_it_is_swept_once(adaptive, count_ops):
    logits, hidden, targets = batch()
    criterion = composed(MTP(V, D, num_future_tokens=2, adaptive=adaptive))
    with count_ops as ops:
        output = criterion.evaluate(logits, targets, hidden_states=hidden)
    assert ops.passes == (1, 0)  # the main prediction's; the heads' logits are never there
    (gradient,) = torch.autograd.grad(output.parts["mtp"], logits, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_short_rows_have_nothing_ahead():
    mtp = MTP(V, D, num_future_tokens=3)
    for length in (1, 2, 3):
        logits = torch.randn(2, length, V, requires_grad=True)
        hidden = torch.randn(2, length, D, requires_grad=True)
        criterion = ComposedLoss(CrossEntropyLoss(), {"mtp": Weighted(mtp.float(), 0.1)})
        parts = criterion.evaluate(
            logits, torch.ones(2, length, dtype=torch.long), hidden_states=hidden
        ).parts
        sum(parts.values()).backward()
        assert parts["mtp"].isfinite()
        assert (parts["mtp"] == 0) == (length == 1)


def test_split_batches_and_weights_of_samples():
    logits, hidden, targets = batch()
    mtp = MTP(V, D, num_future_tokens=2)
    criterion = composed(mtp)
    whole = criterion(logits, targets, hidden_states=hidden)
    count = criterion.count(targets)
    halves = [
        criterion(logits[b : b + 1], targets[b : b + 1], hidden_states=hidden[b : b + 1], denominator=count)
        for b in range(B)
    ]
    torch.testing.assert_close(sum(halves), whole)
    pipeline = LossModifierPipeline([MaskRatioWeightModifier({"power": 1.0})], base=criterion)
    output = pipeline.evaluate(logits, targets, hidden_states=hidden)
    heads = [mtp.predict(k, hidden.reshape(-1, D), None).logits().reshape(B, T, V) for k in range(2)]
    valid = targets != IGNORE
    weight = T / valid.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True) / B
    torch.testing.assert_close(output.parts["mtp"], 0.4 * naive(heads, targets, weight.double().expand(B, T)))


def test_what_is_missing_or_does_not_fit():
    logits, hidden, targets = batch()
    cases = [
        (MTP(V, D), {}, "needs hidden_states"),
        (MTP(V), {"hidden_states": hidden}, "hidden_size=D when the loss is made"),
        (MTP(V, D + 1), {"hidden_states": hidden}, "hidden_size = 6"),
        (MTP(V, D), {"hidden_states": hidden[:, 1:]}, r"positions \[2, 7\]"),
        (MTP(V), {"additional_logits": [logits]}, "num_future_tokens=3 heads; got 1"),
        (MTP(V), {"additional_logits": [logits[:, 1:]] * 3}, r"positions \[2, 7\]; got \[2, 6, 6\]"),
    ]
    for mtp, inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            composed(mtp)(logits, targets, **inputs)
    with pytest.raises(ValueError, match="num_future_tokens must be a whole number >= 1"):
        MTP(V, D, num_future_tokens=0)
    with pytest.raises(ValueError, match="threshold must be a number > 0 and < 1"):
        MTP(V, D, threshold=1.0)

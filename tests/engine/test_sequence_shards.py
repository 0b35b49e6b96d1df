"""Sequences that are split across ranks: every loss is that of the whole, and the gradients add up to its."""

import pytest
import torch
import torch.distributed
from torch.testing import assert_close

import lossmith
from lossmith.engine.shards.layout import VocabShards
from lossmith.engine.shards.sequence import SequenceShards
from lossmith.engine.shards.sharded import ShardedLogits
from ranks import on_ranks

V, D, E, B, T = 11, 6, 4, 3, 12
FOUR = {"label_smoothing": 0.1, "z_loss": 0.1, "focal_gamma": 1.5, "confidence_penalty": 0.1}


def unified(**options):
    return lossmith.UnifiedLoss(
        V, use_ngram_penalty=True, ngram_size=2, use_immediate_repetition_penalty=True, use_focal_loss=True,
        eos_token_id=3, min_sequence_length=6, adaptive_temperature=True, shift=True, **options,
    )  # fmt: skip


# By name: the objective, and what it is given besides logits, targets and input_ids.
CASES = {
    "plain": (lambda: lossmith.CrossEntropyLoss(shift=True), ()),
    "two steps ahead": (lambda: lossmith.CrossEntropyLoss(shift=2), ("mask",)),
    "all four": (lambda: lossmith.CrossEntropyLoss(**FOUR, shift=True), ("token_weight",)),
    "of each sequence": (lambda: lossmith.CrossEntropyLoss(reduction="sequence_mean", shift=True), ("mask",)),
    "none": (lambda: lossmith.CrossEntropyLoss(reduction="none", shift=True), ()),
    "nvamp": (lambda: lossmith.NVAMPLoss(shift=True), ()),
    "pipeline": (
        lambda: lossmith.LossModifierPipeline(
            [
                lossmith.EntropyModifier({}),
                lossmith.MaskRatioWeightModifier({}),
                lossmith.TargetSmoothingModifier({}),
            ],
            base=lossmith.CrossEntropyLoss(shift=True),
        ),
        (),
    ),
    "unified": (unified, ()),
    "packed": (unified, ("segment_ids", "attention_mask")),
    "multi-token prediction": (
        lambda: unified(use_mtp=True, hidden_size=D, num_future_tokens=3), ("hidden_states", "segment_ids")
    ),
    "heads of the model": (
        lambda: unified(use_mtp=True, num_future_tokens=2, mtp_type="adaptive"), ("additional_logits",)
    ),
    "experts": (
        lambda: unified(use_moe_balancing=True, num_experts=E, moe_top_k=2, router_z_loss_weight=0.1),
        ("gate_logits", "attention_mask"),
    ),
}  # fmt: skip
# Where the positions are, among the dimensions of an input.
POSITIONS = {"hidden_states": 1, "additional_logits": 2, "gate_logits": 1}


def layout(kind):
    if kind == "uneven":
        return SequenceShards({2: [[(0, 3), (8, 12)], [(3, 8)]], 3: [[(5, 12)], [(0, 1)], [(1, 5)]]}[
            torch.distributed.get_world_size()
        ])  # fmt: skip
    return getattr(SequenceShards, kind)(T)


def inputs():
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(B, T, V, generator=rng, dtype=torch.float64)
    ids = torch.randint(4, (B, T), generator=rng)
    targets = ids.clone()
    targets[0, :5] = targets[1, 7] = -100
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[2, 9:] = False
    others = {
        "mask": mask,
        "attention_mask": mask.long(),
        "token_weight": torch.rand(B, T, generator=rng, dtype=torch.float64),
        "segment_ids": torch.arange(T).expand(B, T) // 5,
        "hidden_states": torch.randn(B, T, D, generator=rng, dtype=torch.float64),
        "additional_logits": torch.randn(2, B, T, V, generator=rng, dtype=torch.float64),
        "gate_logits": torch.randn(B, T, E, generator=rng, dtype=torch.float64),
    }
    return logits, targets, ids, others


def leaves_of(values):
    return {
        name: value.clone().requires_grad_()
        if value.is_floating_point() and name != "token_weight"
        else value
        for name, value in values.items()
    }


def gradients_of(loss, leaves, upstream):
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()), upstream, allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    return {n: z if g is None else g for n, g, z in zip(leaves, found, zeros, strict=True)}


def losses_of(rank, kind):
    """By case: the whole's loss and gradients, and those of the parts put together."""
    shards = layout(kind)
    logits, targets, ids, others = inputs()
    found = {}
    for name, (make, names) in CASES.items():
        values = {"logits": logits, "targets": targets, "input_ids": ids} | {n: others[n] for n in names}
        found[name] = compared(make, values, shards)
    return found


def compared(make, values, shards, of_part=lambda parts: parts, weights=()):
    """Pairs of what the parts make, and what the whole makes."""
    criteria = []
    for _ in range(2):
        torch.manual_seed(0)
        criteria.append(make().double())
    whole = leaves_of(values)
    parts = leaves_of(
        {n: v if n in weights else shards.part(v, POSITIONS.get(n, 1)) for n, v in values.items()}
    )
    dense = [criteria[0](**whole) for _ in range(2)]  # state moves alike
    ours = [criteria[1](**of_part(parts), sequence=shards) for _ in range(2)]
    upstream = torch.rand(dense[0].shape, dtype=torch.float64, generator=torch.manual_seed(1)) + 0.5
    expected = gradients_of(dense[0], whole | dict(criteria[0].named_parameters()), upstream)
    gradients = gradients_of(ours[0], parts | dict(criteria[1].named_parameters()), upstream)
    found = [(a.detach(), b.detach()) for a, b in zip(ours, dense, strict=True)]
    for leaf, gradient in gradients.items():
        if leaf in parts and leaf not in weights:
            found.append((shards.gather(gradient, POSITIONS.get(leaf, 1)), expected[leaf]))
        else:  # of what every rank has, it is the sum
            torch.distributed.all_reduce(gradient)
            found.append((gradient, expected[leaf]))
    floating = [n for n, v in values.items() if v.is_floating_point() and n != "token_weight"]
    assert len(gradients) == len(floating) + len(list(criteria[1].parameters()))
    return found


def assert_same(found):
    for name, pairs in found.items():
        for ours, whole in pairs:
            assert_close(ours, whole, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("num_ranks", "kind"),
    [
        pytest.param(2, "balanced", marks=pytest.mark.slow),
        (3, "uneven"),
        pytest.param(3, "even", marks=pytest.mark.slow),
    ],
)
def test_every_loss_is_that_of_the_whole(num_ranks, kind, tmp_path):
    for found in on_ranks(num_ranks, losses_of, tmp_path, kind):
        assert len(found) == len(CASES)
        assert_same(found)


HEAD = ("lm_head_weight", "lm_head_bias")


def heads_of(rank, kind):
    shards = layout(kind)
    _, targets, ids, others = inputs()
    first, end = shards.pieces[1][0]
    targets[:, first : end + 1] = -100  # a rank with nothing to learn from
    rng = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((V, D), (V,)))
    values = {"targets": targets, "input_ids": ids, "hidden_states": others["hidden_states"]}
    values |= {"lm_head_weight": weight, "lm_head_bias": bias}
    found = {}
    for name in ("plain", "all four", "of each sequence", "nvamp", "pipeline", "unified"):
        for how in ({"strategy": "two_sweep"}, {"memory_budget": 3 * V * 8}):
            make = CASES[name][0]

            def swept(parts, how=how):
                return {**parts, **how}

            found[f"{name} {how}"] = compared(make, values, shards, swept, HEAD)
    criterion = lossmith.CrossEntropyLoss(**FOUR, shift=True)
    parts = leaves_of({n: v if n in HEAD else shards.part(v, POSITIONS.get(n, 1)) for n, v in values.items()})
    output = criterion.evaluate(**parts, sequence=shards)
    whole = leaves_of(values)
    dense = criterion.evaluate(**whole)
    found["parts"] = [(output.parts[n].detach(), part.detach()) for n, part in dense.parts.items()]
    found["shares"] = [(output.shares, dense.shares)]
    gradient = torch.autograd.grad(output.parts["z_loss"], parts["hidden_states"], retain_graph=True)[0]
    expected = torch.autograd.grad(dense.parts["z_loss"], whole["hidden_states"], retain_graph=True)[0]
    found["gradient of a part"] = [(shards.gather(gradient, 1), expected)]
    if rank == 0:  # reading them is no collective
        numbers = [(torch.tensor(v), torch.tensor(dense.metrics[n])) for n, v in output.metrics.items()]
        found["metrics"] = numbers
        assert len(numbers) == 4 + len(dense.parts)
    return found


@pytest.mark.parametrize(
    ("num_ranks", "kind"), [(2, "even"), pytest.param(3, "uneven", marks=pytest.mark.slow)]
)
def test_a_head_is_swept_in_parts(num_ranks, kind, tmp_path):
    for found in on_ranks(num_ranks, heads_of, tmp_path, kind):
        assert_same(found)


def on_a_grid(rank):
    """Four ranks: two share each half of the sequences, with half of the classes each."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "classes"))
    shards = SequenceShards.balanced(T, mesh.get_group("sequence"))
    classes = VocabShards((7, 4), mesh.get_group("classes"))
    logits, targets, ids, _ = inputs()
    own = slice(classes.starts[classes.rank], classes.starts[classes.rank] + classes.size)
    found = {}
    for name in ("all four", "pipeline", "unified", "nvamp"):
        whole, part = (z.clone().requires_grad_() for z in (logits, shards.part(logits[..., own], 1)))
        dense = CASES[name][0]()(whole, targets, input_ids=ids)
        given = [shards.part(values) for values in (targets, ids)]
        ours = CASES[name][0]()(ShardedLogits(part, classes), given[0], input_ids=given[1], sequence=shards)
        (expected,) = torch.autograd.grad(dense, whole)
        (gradient,) = torch.autograd.grad(ours, part)
        found[name] = [(ours.detach(), dense.detach()), (gradient, shards.part(expected[..., own], 1))]
    return found


@pytest.mark.slow
def test_sequences_and_classes_are_split_together(tmp_path):
    for found in on_ranks(4, on_a_grid, tmp_path):
        assert_same(found)


def collectives_of(rank):
    shards, calls = SequenceShards.even(T), []
    logits, targets, ids, others = inputs()
    for name in ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter"):
        original = getattr(torch.distributed, name)
        setattr(torch.distributed, name, lambda *a, o=original, n=name, **k: (calls.append(n), o(*a, **k))[1])
    counts = {}
    for name, (make, names) in CASES.items():
        torch.manual_seed(0)
        criterion = make().double()
        values = {"logits": logits, "targets": targets, "input_ids": ids} | {n: others[n] for n in names}
        parts = leaves_of({n: shards.part(v, POSITIONS.get(n, 1)) for n, v in values.items()})
        calls.clear()
        criterion.evaluate(**parts, sequence=shards).total.sum().backward()
        counts[name] = list(calls)
    return counts


def test_a_step_has_two_small_collectives(tmp_path):
    of_heads = {"multi-token prediction": 3, "heads of the model": 2, "experts": 1}
    for counts in on_ranks(2, collectives_of, tmp_path):
        for name, calls in counts.items():
            assert calls == ["all_gather"] * (2 + of_heads.get(name, 0)), name


def refused(rank):
    shards = SequenceShards.even(T)
    logits, targets, ids, others = inputs()
    parts = {"logits": shards.part(logits, 1), "targets": shards.part(targets), "sequence": shards}
    hidden = shards.part(others["hidden_states"], 1)
    plain, modifier = lossmith.CrossEntropyLoss(), lossmith.EntropyModifier({})
    pipeline = lossmith.LossModifierPipeline([modifier])
    messages = []
    for make, error in (
        (lambda: SequenceShards([[(0, 5)], [(6, 8)]]), ValueError),
        (lambda: SequenceShards([[(0, 5)]]), ValueError),
        (lambda: SequenceShards([[(0, 5)], [(4, 8)]]), ValueError),
        (lambda: SequenceShards([[0, 5], [5, 8]]), TypeError),
        (lambda: SequenceShards.balanced(10), ValueError),
        (lambda: SequenceShards.even(1), ValueError),
        (lambda: plain(**{**parts, "targets": targets}), ValueError),
        (lambda: plain(**{**parts, "logits": logits}), ValueError),
        (lambda: plain(**parts, input_ids=ids), ValueError),
        (lambda: plain(**parts, mask=[1, 0]), TypeError),
        (lambda: unified(use_contrastive_loss=True)(**parts, hidden_states=hidden), ValueError),
        (lambda: pipeline(**parts, per_position_loss=torch.zeros(parts["targets"].shape)), ValueError),
        (lambda: shards.part(torch.zeros(2, 3)), ValueError),
        (lambda: plain(**{**parts, "sequence": 3}), TypeError),
    ):
        with pytest.raises(error) as caught:
            make()
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_is_refused(tmp_path):
    for messages in on_ranks(2, refused, tmp_path):
        expected = [
            "every position must be in one piece; 5 is not",
            "expected pieces of each of 2 ranks",
            "every position must be in one piece; 4 is not",
            "(first position, position after the last), as in [[(0, 5)], [(5, 8)]]; got [[0, 5], [5, 8]]",
            "expected a multiple of 2 x 2 positions; got 10",
            "expected pieces of each of 2 ranks",
            "has 6 of the 12 positions; got targets of 12",
            "[3, 12",
            "has 6 of the 12 positions; got input_ids of 12",
            "mask must be a tensor",
            "'contrastive_loss' (Contrastive) reads hidden_states of whole sequences",
            "takes no per_position_loss, which would be of this rank's positions alone",
            "expected 12 positions; got a tensor [2, 3]",
            "sequence must be lossmith.SequenceShards",
        ]
        for message, part in zip(messages, expected, strict=True):
            assert part in message

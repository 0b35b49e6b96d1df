"""What an objective inside a model gets to see: labels, masks and documents as the batch has them, and what
the caller has before what the model makes."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from huggingface_models import D, T, V, batch, make, mean_nll, shifted
from huggingface_trainers import arguments, mtp
from torch.nn import functional as F

import lossmith
from lossmith.integrations.huggingface import LossTrainer, attach, compute_loss_func
from lossmith.integrations.huggingface.attachment import attached_to
from lossmith.integrations.huggingface.labels import label_mask, segments

LABELS = torch.zeros(2, 6, dtype=torch.long)


def logits_of(model, inputs):
    with torch.no_grad():
        return model(inputs["input_ids"], inputs["attention_mask"]).logits


# ── labels, masks, documents ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]),
        ([0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 1, 2]),
        ([0, 0, 0, 1, 0, 0], [0, 1, 2, 2, 3, 4]),  # documents of one token
        ([7, 8, 9, 2, 3, 4], [0, 0, 0, 1, 1, 1]),  # that do not begin at 0
        ([3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_positions_that_do_not_go_on_begin_a_document(positions, expected):
    row = torch.tensor([positions])
    assert segments(row, LABELS[:1]).tolist() == [expected]
    assert segments(row, LABELS).tolist() == [expected, expected]  # of all rows
    assert segments(torch.cat([row, row.new_zeros(1, 6).add(torch.arange(6))]), LABELS).tolist() == [
        expected,
        [0] * 6,
    ]


def test_positions_of_something_else_say_nothing():
    positions = torch.arange(6)
    for other in (None, positions, positions[None, :5], positions.expand(3, 6), positions.expand(3, 1, 6)):
        assert segments(other, LABELS) is None


def test_documents_of_one_token_are_documents():
    """Through the model: none of them is looked back at from the next."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    positions = torch.tensor([[0, 1, 0, 0, 1, 0, 0, 0]])
    documents = torch.tensor([[0, 0, 1, 2, 2, 3, 4, 5]])
    loss = lossmith.UnifiedLoss(V, use_ngram_penalty=True, ngram_size=1, ngram_window_size=4)
    model = make("llama")
    with torch.no_grad():
        logits = model(ids, position_ids=positions).logits
        expected = loss(logits, shifted(ids), input_ids=ids, segment_ids=documents)
        merged = loss(logits, shifted(ids), input_ids=ids, segment_ids=documents.clamp(max=3))
        assert not torch.allclose(expected, merged)
        found = attach(model, loss)(ids, labels=ids, position_ids=positions).loss
    torch.testing.assert_close(found, expected)


def test_a_mask_is_of_the_labels_tokens():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert torch.equal(label_mask(mask, LABELS), mask.bool())
    assert torch.equal(label_mask(2.0 * mask, LABELS), mask.bool())
    with_cache = torch.cat([torch.tensor([[1, 1, 0], [0, 0, 1]]), mask], 1)
    assert torch.equal(label_mask(with_cache, LABELS), mask.bool())


def test_a_mask_of_something_else_says_nothing():
    """One of another batch, a cached one for instance, or of a kernel."""
    mask = torch.zeros(2, 6)
    for other in (None, mask[:1], mask.repeat(2, 1), mask[:, 1:], mask[:, None, None], mask[0], "causal"):
        assert label_mask(other, LABELS) is None


@pytest.mark.parametrize("ignored", [-1, 7, 0])
def test_another_id_of_tokens_without_a_target(ignored, tmp_path):
    """The objective's own counts as well as Hugging Face's -100, wherever the loss is computed."""
    inputs = batch(8)
    inputs["labels"][:, 5].masked_fill_(inputs["labels"][:, 5] != -100, 7)
    targets = shifted(inputs["labels"])
    targets = targets.masked_fill(targets == ignored, -100)
    num_tokens = (targets != -100).sum()
    loss = lossmith.CrossEntropyLoss(ignore_index=ignored)
    model = make("llama")
    logits = logits_of(model, inputs)
    expected = mean_nll(logits, targets, num_tokens)
    torch.testing.assert_close(compute_loss_func(loss)({"logits": logits}, inputs["labels"]), expected)
    trainer = LossTrainer(loss=loss, model=model, args=arguments(tmp_path))
    assert trainer._get_num_items_in_batch([inputs], trainer.args.device) == num_tokens
    for materialize in (False, True):
        attach(model, loss, materialize_logits=materialize)
        torch.testing.assert_close(model(**inputs).loss, expected)


# ── what the caller has goes first ────────────────────────────────────────────────────────────────


def test_segment_ids_of_the_caller_go_before_the_positions():
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    given = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    loss = lossmith.UnifiedLoss(V, use_ngram_penalty=True, ngram_size=1, ngram_window_size=4)
    model = make("llama")
    with torch.no_grad():
        logits = model(ids, position_ids=positions).logits
        targets = shifted(ids)
        expected = loss(logits, targets, input_ids=ids, segment_ids=given)
        by_positions = loss(logits, targets, input_ids=ids, segment_ids=segments(positions, ids))
        assert not torch.allclose(expected, by_positions)
        attach(model, loss)
        found = model(ids, labels=ids, position_ids=positions, segment_ids=given).loss
        torch.testing.assert_close(found, expected)
        found = model(ids, labels=ids, position_ids=positions, segment_ids=None).loss
        torch.testing.assert_close(found, by_positions)


@pytest.mark.parametrize("is_training", [False, True])
def test_hidden_states_of_the_caller_go_before_the_heads(is_training):
    """The main loss is the model's all the same."""
    model, inputs, loss = make("llama").train(is_training), batch(), mtp()
    hidden = torch.randn(4, T, D)
    logits = logits_of(model, inputs)
    options = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = loss(logits, shifted(inputs["labels"]), hidden_states=hidden, **options)
    attach(model, loss)
    output = model(**inputs, hidden_states=hidden)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is not None  # the loss is made of them: the head has not seen these
    assert not torch.allclose(model(**inputs).loss, expected)


def test_gate_logits_of_the_caller_go_before_the_routers():
    balance = {"use_moe_balancing": True, "num_experts": 4, "moe_top_k": 2, "gradient_balance_weight": 10.0}
    model, inputs = make("mixtral"), batch()
    loss = lossmith.UnifiedLoss(V, **balance)
    gates = torch.randn(4, T, 4)
    logits, mask = logits_of(model, inputs), inputs["attention_mask"]
    expected = loss(logits, shifted(inputs["labels"]), gate_logits=gates, attention_mask=mask)
    attach(model, loss)
    torch.testing.assert_close(model(**inputs, gate_logits=gates).loss, expected)
    assert not torch.allclose(model(**inputs).loss, expected)


# ── what is switched on later ─────────────────────────────────────────────────────────────────────


def by_samples() -> tuple[lossmith.LossModifierPipeline, lossmith.BaseLossModifier]:
    modifier = lossmith.MaskRatioWeightModifier({"enabled": False})
    return lossmith.LossModifierPipeline([modifier]), modifier


def test_modifiers_that_are_switched_on_later_change_what_is_divided_by():
    inputs, (pipeline, modifier) = batch(), by_samples()
    outputs = {"logits": torch.randn(4, T, V)}
    function, model = compute_loss_func(pipeline), attach(make("llama"), pipeline)
    for is_on in (False, True, False):
        modifier.enabled = is_on
        calls = (
            lambda: function(outputs, inputs["labels"], num_items_in_batch=30),
            lambda: model(**inputs, num_items_in_batch=30).loss,
        )
        for call in calls:
            if is_on:
                with pytest.raises(ValueError, match=r"divides by samples"):
                    call()
            else:
                assert call().isfinite()
        assert function(outputs, inputs["labels"]).isfinite()
        num_items = attached_to(model).count(inputs["labels"], inputs["attention_mask"])
        assert num_items == (4 if is_on else (shifted(inputs["labels"]) != -100).sum())


def test_a_component_that_is_switched_on_later_gets_what_it_needs():
    balance = {"use_moe_balancing": True, "num_experts": 4, "moe_top_k": 2}
    loss = lossmith.UnifiedLoss(V, D, use_mtp=True, **balance)
    model, inputs = attach(make("mixtral"), loss), batch()
    weights = {name: weighted.weight for name, weighted in loss.components.items()}
    expected = model(**inputs).loss
    for weighted in loss.components.values():
        weighted.weight = 0.0
    assert {"mtp_loss", "moe_balance_loss"} < set(attached_to(model).parts)
    plain = model(**inputs).loss
    assert set(attached_to(model).parts) == {"cross_entropy"}
    logits = logits_of(model, inputs)
    targets = shifted(inputs["labels"])
    torch.testing.assert_close(plain, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    for name, weighted in loss.components.items():
        weighted.weight = weights[name]
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert {"mtp_loss", "moe_balance_loss"} < set(attached_to(model).parts)

"""An objective inside a model's forward: the value, the gradients, and nothing else that changes."""

import inspect

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from huggingface_models import (
    MODELS,
    D,
    T,
    V,
    assert_same,
    batch,
    gradients,
    make,
    mean_nll,
    shifted,
)
from torch.nn import functional as F

import lossmith
from lossmith.integrations.huggingface import attach, detach

EXACT = {"rtol": 1e-9, "atol": 1e-10}
UNIFIED = {"label_smoothing": 0.1, "z_loss": 0.01, "use_mtp": True, "num_future_tokens": 2}


def unified(**options) -> lossmith.UnifiedLoss:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lossmith.UnifiedLoss(V, D, **{**UNIFIED, **options})


# ── sequences that are cut, or joined ─────────────────────────────────────────────────────────────


def test_labels_may_be_shifted_already():
    inputs = batch(side="left")
    labels, mask = inputs["labels"], inputs["attention_mask"]
    aligned = torch.full_like(labels, -100)
    aligned[:, :-1] = labels[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    for loss in (lossmith.CrossEntropyLoss(label_smoothing=0.1), unified(use_ngram_penalty=True)):
        found = []
        for more in ({}, {"shift_labels": aligned}):
            model = attach(make("llama"), loss)
            model(**inputs, **more).loss.backward()
            found.append(gradients(model))
        assert_same(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_sequences_may_be_split(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        inputs, loss = batch(), unified(use_ngram_penalty=True)
        sequence = lossmith.SequenceShards([[(0, 5), (5, T)]])
        values = [attach(make("llama"), loss)(**inputs, **more).loss for more in ({}, {"sequence": sequence})]
        torch.testing.assert_close(values[1], values[0])
    finally:
        torch.distributed.destroy_process_group()


# ── the value ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_plain_cross_entropy_is_the_models_own_loss(name, side):
    model, inputs = make(name), batch(side=side)
    for more in ({}, {"num_items_in_batch": torch.tensor(31)}):
        expected = model(**inputs, **more)
        expected.loss.backward()
        expected_gradients = gradients(model)
        attach(model, lossmith.CrossEntropyLoss())
        found = model(**inputs, **more)
        found.loss.backward()
        torch.testing.assert_close(found.loss, expected.loss)
        assert_same(gradients(model), expected_gradients, rtol=1e-4, atol=1e-6)
        assert type(found) is type(expected)
        assert list(found) == [name for name in expected if name != "logits"]
        assert found.logits is None
        attach(model, lossmith.CrossEntropyLoss(), materialize_logits=True)
        again = model(**inputs, **more)
        assert list(again) == list(expected)
        assert torch.equal(again.logits, expected.logits)
        torch.testing.assert_close(found.loss, again.loss)
        detach(model)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_part_is_what_it_is_by_hand(name, shared):
    """Smoothing, z-loss, heads that look further ahead and, where there are experts, their balance."""
    model, inputs = make(name, torch.float64), batch(side="left")
    has_experts = name == "mixtral"
    moe = {"use_moe_balancing": True, "num_experts": 4, "moe_top_k": 2, "router_z_loss_weight": 0.01}
    loss = unified(shared_projection=shared, **(moe if has_experts else {})).double()
    mtp = loss.components["mtp_loss"].component
    labels, mask = inputs["labels"], inputs["attention_mask"].bool()
    targets = shifted(labels)
    num_tokens = (targets != -100).sum()

    asked = {"output_router_logits": True} if has_experts else {}
    output = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **asked)
    hidden, weight = output.last_hidden_state, model.lm_head.weight
    logits = hidden @ weight.T
    expected = mean_nll(logits, targets, num_tokens, label_smoothing=0.1)
    expected += 0.01 * logits.logsumexp(-1)[targets != -100].square().sum() / num_tokens
    for k in (1, 2):
        seen = mtp.heads[k - 1](hidden)
        ahead = (seen + hidden) @ weight.T if shared else seen
        expected += 0.1 * mean_nll(ahead, shifted(labels, k + 1), num_tokens) / 2
    if has_experts:
        for z in output.router_logits:
            z = z.reshape(*mask.shape, -1)[mask]
            usage = F.one_hot(z.topk(2).indices, 4).sum((0, 1)) / (2 * len(z))
            expected += 0.1 * 4 * (usage * z.softmax(-1).mean(0)).sum() / 2
            expected += 0.01 * z.logsumexp(-1).square().mean() / 2
    expected.backward()
    expected_gradients = gradients(model)
    expected_of_loss = gradients(loss)
    attach(model, loss)
    found = model(**inputs)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected, **EXACT)
    assert_same(gradients(loss), expected_of_loss, **EXACT)
    names = list(expected_gradients)
    everything = gradients(model)
    in_fp32 = {"rtol": 1e-4, "atol": 1e-6}  # the routers of the model round, forwards and backwards
    tolerance = in_fp32 if has_experts else EXACT
    assert_same({n: everything[n] for n in names}, expected_gradients, **tolerance)
    assert ("router_logits" in found) is False  # nobody asked for them


def test_the_shift_is_made_once_whatever_the_objective_says():
    inputs = batch()
    losses = []
    for shift in (False, True):
        loss = lossmith.UnifiedLoss(V, shift=shift, use_ngram_penalty=True, ngram_size=1)
        losses.append(attach(make("llama"), loss)(**inputs).loss)
        assert loss.shift is shift
    assert torch.equal(*losses)


def test_padding_that_has_labels_does_not_count():
    """A collator may copy the ids and leave padding to the mask; -100 and the mask both apply."""
    for side in ("left", "right"):
        inputs = batch(side=side)
        model = attach(make("llama"), unified(use_ngram_penalty=True))
        expected = model(**inputs).loss
        copied = {**inputs, "labels": torch.where(inputs["attention_mask"] == 0, 5, inputs["labels"])}
        torch.testing.assert_close(model(**copied).loss, expected)
        torch.testing.assert_close(
            model(**{**copied, "attention_mask": inputs["attention_mask"].float()}).loss, expected
        )


def test_packed_rows_are_read_by_document():
    """Positions that start again: no n-gram and no head reaches across."""
    first, second = torch.tensor([[5, 6, 7, 5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9, 9]])
    ids = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).unsqueeze(0)
    segments = (torch.arange(12) >= 7).long().unsqueeze(0)
    loss = unified(use_ngram_penalty=True, ngram_size=2, ngram_window_size=8, use_mtp=True)
    model = make("llama")
    hidden = model.model(ids, position_ids=positions).last_hidden_state
    options = {"input_ids": ids, "hidden_states": hidden, "lm_head_weight": model.lm_head.weight}
    targets = shifted(ids)
    expected = loss(model.lm_head(hidden), targets, segment_ids=segments, **options)
    across = loss(model.lm_head(hidden), targets, **options)
    assert not torch.allclose(expected, across)
    attach(model, loss)
    for more in ({"position_ids": positions}, {"position_ids": positions, "segment_ids": segments}):
        torch.testing.assert_close(model(ids, labels=ids, **more).loss, expected)


def test_what_the_caller_has_for_the_objective_reaches_it():
    inputs = batch()
    loss = lossmith.UnifiedLoss(V, primary_loss_type="adaptive_mtp")
    scores = torch.rand(inputs["labels"].shape)
    weight = torch.rand(inputs["labels"].shape)
    model = make("llama")
    logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
    more = {"confidence_scores": scores, "token_weight": weight}
    with torch.no_grad():
        shifted_weight = F.pad(weight[:, 1:], (0, 1))
        expected = loss(
            logits, shifted(inputs["labels"]), confidence_scores=scores, token_weight=shifted_weight
        )
    attach(model, loss)
    torch.testing.assert_close(model(**inputs, **more).loss, expected)
    assert {"confidence_scores", "token_weight", "denominator"} <= set(
        inspect.signature(model.forward).parameters
    )  # where the Trainer looks which columns of a data set to keep
    model(inputs["input_ids"], confidence_scores=scores)  # without labels nobody wants them


def test_a_batch_with_nothing_to_learn_gives_zero():
    model, inputs = attach(make("llama"), unified()), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for more in ({}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(7)}):
        loss = model(**inputs, **more).loss
        loss.backward()
        assert loss == 0
        assert all((g == 0).all() for g in gradients(model).values())


def test_experts_are_balanced_by_the_objective_alone():
    """The model computes router logits for us, and adds no auxiliary loss of its own, though its
    configuration says so."""
    inputs = batch()
    plain = attach(make("mixtral"), lossmith.CrossEntropyLoss())
    both = attach(make("mixtral", output_router_logits=True), lossmith.CrossEntropyLoss())
    assert torch.equal(plain(**inputs).loss, both(**inputs).loss)
    assert "router_logits" in both(**inputs)
    with_balance = lossmith.UnifiedLoss(V, use_moe_balancing=True, num_experts=4, moe_top_k=2)
    assert attach(plain, with_balance)(**inputs).loss > both(**inputs).loss


# ── what is refused ───────────────────────────────────────────────────────────────────────────────


def test_num_items_in_batch_is_not_divided_by_where_samples_are_counted():
    pipeline = lossmith.LossModifierPipeline([lossmith.MaskRatioWeightModifier({})])
    model, inputs = attach(make("llama"), pipeline), batch()
    with pytest.raises(ValueError, match=r"number of tokens.*divides by samples.*LossTrainer.*denominator="):
        model(**inputs, num_items_in_batch=30)
    expected = model(**inputs).loss
    torch.testing.assert_close(model(**inputs, denominator=4).loss, expected)
    with pipeline.temporarily_disabled():
        model(**inputs, num_items_in_batch=30)
    attach(model, lossmith.CrossEntropyLoss(class_weight=torch.rand(V)))
    with pytest.raises(ValueError, match="class weights"):
        model(**inputs, num_items_in_batch=30)


def test_what_does_not_go_together():
    with pytest.raises(TypeError, match=r"must be a lossmith\.Objective; got CrossEntropyLoss"):
        attach(make("llama"), torch.nn.CrossEntropyLoss())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="before anything wraps it; got Sequential"):
        attach(torch.nn.Sequential(make("llama")), unified())
    with pytest.raises(ValueError, match="reduction='none'"):
        attach(make("llama"), lossmith.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="model_mode=LANGUAGE_MODEL"):
        attach(make("llama"), lossmith.LossModifierPipeline(model_mode="SEQUENCE_SCORER"))
    bare = make("llama").model
    with pytest.raises(ValueError, match="LlamaModel is none"):
        attach(bare, unified())
    t5 = transformers.T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=32))
    with pytest.raises(ValueError, match="BertForMaskedLM is none"):
        attach(masked, unified())
    classifier = transformers.LlamaForSequenceClassification(make("llama").config)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is none"):
        attach(classifier, unified())
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is none"):
        attach(transformers.T5ForConditionalGeneration(t5), unified())


def test_experts_that_are_not_those_of_the_model():
    balance = {"use_moe_balancing": True, "num_experts": 4}
    with pytest.raises(ValueError, match=r"counts 1 experts a token.*asks 2.*moe_top_k=2"):
        attach(make("mixtral"), unified(**balance))
    model = attach(make("llama"), unified(**balance))
    with pytest.raises(ValueError, match="LlamaForCausalLM returns no router_logits"):
        model(**batch())
    gates = torch.randn(4, T, 4)
    assert model(**batch(), gate_logits=gates).loss.isfinite()

"""A model is tried on a few tokens before it is trained: what is found out, and that nothing else changes."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from huggingface_models import V, assert_same, batch, gradients, make, mean_nll, shifted
from special_models import capped, does, empty, filled, later, learned
from torch import nn

import lossmith
from lossmith.integrations.huggingface import attach
from lossmith.integrations.huggingface.attachment import attached_to
from lossmith.integrations.huggingface.trial import AfterHead, made_up_logits, try_out

CLOSE = {"rtol": 1e-5, "atol": 1e-7}


# ── what comes after the head ─────────────────────────────────────────────────────────────────────

KNOWN = {
    "nothing": (lambda z: z, AfterHead()),
    "upcast": (lambda z: z.float(), AfterHead()),
    "downcast": (lambda z: z.to(torch.bfloat16), AfterHead()),
    "scale": (lambda z: z * 0.0625, AfterHead(0.0625)),
    "division": (lambda z: z.float() / 13.0, AfterHead(1 / 13)),
    "cap": (lambda z: torch.tanh(z / 30.0) * 30.0, AfterHead(1.0, 30.0)),
    "cap in fp32": (lambda z: torch.tanh(z.float() / 30.0) * 30.0, AfterHead(1.0, 30.0)),
    "scale and cap": (lambda z: torch.tanh(z * 0.2 / 20.0) * 20.0, AfterHead(0.2, 20.0)),
    "wide cap": (lambda z: torch.tanh(z / 900.0) * 900.0, AfterHead(1.0, 900.0)),
}
LEARNED = nn.Parameter(torch.ones(()))
UNKNOWN = {
    "shift": lambda z: z + 1e-3,
    "bias": lambda z: z + torch.arange(V) / V,
    "clamp": lambda z: z.clamp(-50, 50),
    "masked tokens": lambda z: z.index_fill(-1, torch.tensor([7]), -1e9),
    "later positions": lambda z: torch.cat([z[:, :3], 1.01 * z[:, 3:]], 1),
    "another row": lambda z: z.flip(0),
    "learned scale": lambda z: z * LEARNED,
    "softmax": lambda z: z.log_softmax(-1),
    "leaky": lambda z: torch.where(z > 0, z, 0.99 * z),
    "scaled in bf16": lambda z: z.to(torch.bfloat16) * 0.3,
    "capped in bf16": lambda z: 30 * torch.tanh(z.to(torch.bfloat16) / 30),
    "last position": lambda z: z[:, -1:],
    "something else": lambda z: torch.ones(2, 8, V, requires_grad=True) * 1.0,
    "zero": lambda z: z * 0,
}


@pytest.mark.parametrize("kind", KNOWN)
def test_a_scale_and_a_cap_are_measured(kind):
    done, expected = KNOWN[kind]
    given = made_up_logits(torch.zeros(2, 8, V))
    after = AfterHead.seen(given, done(given.clone()))
    assert after is not None
    assert after.scale == pytest.approx(expected.scale, rel=1e-6)
    assert after.softcap == (None if expected.softcap is None else pytest.approx(expected.softcap, rel=1e-6))
    z = torch.linspace(-40, 40, 9, dtype=torch.float64)
    torch.testing.assert_close(after(z), expected(z), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_anything_else_is_not_taken_for_it(kind):
    given = made_up_logits(torch.zeros(2, 8, V, dtype=torch.bfloat16))
    assert AfterHead.seen(given, UNKNOWN[kind](given.clone())) is None


@pytest.mark.parametrize("is_first_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("what", "is_fused"), [(capped, True), (learned, False), (later, False)])
def test_no_model_trains_on_another_loss(what, is_fused, dtype, is_first_compiled):
    """No configuration tells of what these do. Some of it does not show in the first position of a batch,
    some not in bf16, some not before it has been learned; and a compiled forward cannot look."""
    model, inputs = does(what).to(dtype), batch()
    expected = model(**inputs).loss
    expected.backward()
    by_model = gradients(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        attach(model, lossmith.CrossEntropyLoss())
    assert len(said) == (not is_fused)
    assert is_fused or "the loss from them: its logits are not hidden @ weight.T" in str(said[0].message)
    forward = torch.compile(model, backend="aot_eager") if is_first_compiled else model
    found = forward(**inputs)
    found.loss.backward()
    assert (found.logits is None) is is_fused
    tolerance = CLOSE if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(found.loss.to(dtype), expected.to(dtype), **tolerance)
    if is_fused:
        by_model.pop("factor", None)
    assert_same(gradients(model), by_model, **tolerance)
    torch._dynamo.reset()


# ── nothing is left behind ────────────────────────────────────────────────────────────────────────


class Restless(transformers.LlamaForCausalLM):
    """A model that changes with every forward, and draws numbers in any mode."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(2, 3))
        self.seen = []

    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
        self.calls += 1
        self.last = torch.rand(2, 3)
        self.seen.append((self.training, torch.is_grad_enabled()))
        return super().forward(input_ids, attention_mask, labels=labels, **inputs)


def test_a_model_is_left_as_it_was():
    model = Restless(make("llama").config).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    hooks = len(model.lm_head._forward_hooks)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    trial = try_out(model)
    assert torch.equal(torch.rand(4), expected)
    assert (trial.shift, trial.after, trial.why_not) == (1, AfterHead(), None)
    assert model.seen == [(False, False)]
    assert [module.training for module in model.modules()] == modes
    assert_same(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model.lm_head._forward_hooks) == hooks
    assert torch.is_grad_enabled()


def test_the_tokens_stand_for_text():
    """Not for images, sounds, padding or an end."""
    model = make("llama", pad_token_id=3, eos_token_id=[2, 5])
    model.config.image_token_id, model.config.audio_token_index = 4, 6
    seen = []
    model.register_forward_pre_hook(lambda _, args, inputs: None, with_kwargs=True)
    model.model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    try_out(model)
    assert seen[0].shape == (2, 8)
    assert not torch.isin(seen[0], torch.tensor([0, 1, 2, 3, 4, 5, 6])).any()


def test_in_inference_mode_as_well():
    with torch.inference_mode():
        assert try_out(make("gpt2")).after == AfterHead()


# ── where no forward can be made ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_first_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_that_are_not_there_yet(is_first_compiled):
    """It is said once; the first batch shows, unless it is compiled: then the logits are there."""
    with pytest.warns(UserWarning, match=r"could not be tried .*meta device.*first batch.*compiled") as said:
        model = filled(attach(empty(), lossmith.CrossEntropyLoss()))
    assert len(said) == 1
    inputs = batch()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if is_first_compiled else model
    expected = make("llama")(**inputs).loss
    for is_materialised in (is_first_compiled, is_first_compiled):
        found = forward(**inputs)
        torch.testing.assert_close(found.loss, expected)
        assert (found.logits is not None) is is_materialised
    torch._dynamo.reset()
    assert model(**inputs).logits is None


def test_the_first_batch_shows_what_is_done_to_the_logits():
    """At more than one position, and in evaluation too."""
    for what, is_fused in ((capped, True), (later, False), (learned, False)):
        model = does(what)
        model.lm_head.weight.ds_id = 0  # as under ZeRO-3
        with pytest.warns(UserWarning, match="ZeRO-3 has parted its weights"):
            attach(model, lossmith.CrossEntropyLoss())
        del model.lm_head.weight.ds_id
        attached = attached_to(model)
        attached.fused.why_not = None
        attached.leaves_out_logits = True
        inputs = batch()
        with torch.no_grad():
            logits = copy.deepcopy(model)(inputs["input_ids"], inputs["attention_mask"]).logits
            targets = shifted(inputs["labels"])
            expected = mean_nll(logits, targets, (targets != -100).sum())
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = model.eval()(**inputs)
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(found.loss, expected)
        assert (found.logits is None) is is_fused
        assert len(said) == (not is_fused)


class NeedsPixels(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, pixel_values=None, **inputs):
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        return super().forward(input_ids, attention_mask, labels=labels, **inputs)


def test_a_model_that_needs_more_than_text():
    torch.manual_seed(0)
    model = NeedsPixels(make("llama").config).train()
    inputs = {**batch(), "pixel_values": torch.zeros(1)}
    expected = model(**inputs).loss
    with pytest.warns(UserWarning, match="ValueError: You have to specify pixel_values"):
        attach(model, lossmith.CrossEntropyLoss())
    with pytest.raises(
        ValueError, match="You have to specify pixel_values"
    ):  # as without us, and no conclusion
        model(**batch())
    found = model(**inputs)
    torch.testing.assert_close(found.loss, expected)
    assert found.logits is None


def test_what_other_hooks_do_to_the_logits_is_seen():
    model, inputs = make("llama").train(), batch()
    model.lm_head.register_forward_hook(lambda head, _, logits: 3 * logits)
    expected = model(**inputs).loss
    found = attach(model, lossmith.CrossEntropyLoss())(**inputs)
    torch.testing.assert_close(found.loss, expected)
    assert found.logits is None
    attached_to(model).fused.after = None  # as where it could not be tried before
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert attached_to(model).fused.after == AfterHead(3.0)


def test_a_head_with_a_forward_of_its_own_keeps_its_logits():
    model, inputs = make("llama").train(), batch()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * plain(hidden)
    expected = model(**inputs).loss
    with pytest.warns(
        UserWarning, match="computed as always, all at once, and the loss from them: its head has"
    ):
        found = attach(model, lossmith.CrossEntropyLoss())(**inputs)
    torch.testing.assert_close(found.loss, expected)
    assert "forward of its own" in attached_to(model).fused.why_not

"""Heads that are no plain linear layer, or that are replaced after the loss was attached."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from huggingface_models import D, V, batch, gradients, make
from huggingface_trainers import arguments, rows
from special_models import Largest

import lossmith
from lossmith.integrations.huggingface import attach, detach
from lossmith.integrations.huggingface.attachment import attached_to

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: the weight is packed, in another shape."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.values = plain.weight.detach()
        packed = torch.zeros(self.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, hidden):
        return hidden @ self.values.T


def sequential(plain: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(D), plain)


def swapped(model, make_head) -> None:
    model.set_output_embeddings(make_head(model.get_output_embeddings()))


def shared_heads() -> lossmith.UnifiedLoss:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lossmith.UnifiedLoss(V, D, use_mtp=True, shared_projection=True, num_future_tokens=1)


@pytest.mark.parametrize("when", ["before", "after the first batch"])
@pytest.mark.parametrize("kind", [Linear4bit, sequential])
def test_another_head_has_its_own_logits(kind, when):
    inputs = batch()
    model = make("llama").train()
    said = pytest.warns(UserWarning, match="all at once, and the loss from them: its head is a")
    if when == "before":
        swapped(model, kind)
        with said:
            attach(model, lossmith.CrossEntropyLoss())
        found = model(**inputs)
    else:
        attach(model, lossmith.CrossEntropyLoss())(**inputs)
        swapped(model, kind)
        with said:
            found = model(**inputs)
    assert found.logits is not None
    torch.testing.assert_close(found.loss, detach(copy.deepcopy(model))(**inputs).loss, **CLOSE)
    name = "Linear4bit" if kind is Linear4bit else "Sequential"
    assert attached_to(model).fused.why_not == f"its head is a {name}"


@pytest.mark.parametrize("kind", [Linear4bit, sequential])
def test_shared_heads_keep_an_unembedding_of_their_own(kind):
    """Where the model's is no weight of numbers, theirs is used, and trained."""
    model = make("llama").train()
    swapped(model, kind)
    loss = shared_heads()
    with pytest.warns(UserWarning, match="its head is a"):
        attach(model, loss)
    model(**batch()).loss.backward()
    assert any("unembedding" in name and gradient.any() for name, gradient in gradients(loss).items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_that_is_put_on_the_head_after_the_first_batch():
    peft = pytest.importorskip("peft")
    inputs = batch()
    model = attach(make("llama").train(), lossmith.CrossEntropyLoss())
    model(**inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    with pytest.warns(UserWarning, match="its head is a"):
        found = adapted(**inputs)
    assert found.logits is not None
    assert "lora" in attached_to(model).fused.why_not
    found.loss.backward()
    assert all(p.grad.any() for name, p in adapted.named_parameters() if "lm_head" in name and "lora" in name)
    torch.testing.assert_close(found.loss, detach(adapted)(**inputs).loss, **CLOSE)


def test_a_head_of_another_size_is_left_out_again():
    model = attach(make("llama").train(), lossmith.CrossEntropyLoss())
    inputs = batch()
    model(**inputs)
    model.resize_token_embeddings(V + 9)
    found = model(**inputs)
    assert found.logits is None
    torch.testing.assert_close(found.loss, detach(model)(**inputs).loss, **CLOSE)
    assert not model.lm_head._forward_hooks


def test_a_weight_that_is_quantised_in_place():
    class Quantised(torch.Tensor):
        pass

    model = make("llama").train()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Quantised))
    with pytest.warns(UserWarning, match="its head's weight is a Quantised"):
        attach(model, lossmith.CrossEntropyLoss())
    assert attached_to(model).fused.why_not == "its head's weight is a Quantised"


def test_a_packed_weight_is_refused_with_the_remedy():
    weight = Linear4bit(nn.Linear(D, V)).weight
    with pytest.raises(TypeError, match=r"got torch\.uint8\. A quantised head has no other weight; pass its"):
        lossmith.linear_cross_entropy(torch.zeros(4, D), weight, torch.zeros(4, dtype=torch.long))


# ── evaluation ────────────────────────────────────────────────────────────────────────────────────


def test_without_logits_in_evaluation_too(tmp_path):
    """A plain Trainer then takes no more memory than in training."""
    from transformers import Trainer

    vocabulary = 500
    sizes = {"per_device_eval_batch_size": 8, "per_device_train_batch_size": 8}
    found = {}
    for materialize in (None, False, True):
        model = make("llama", vocab_size=vocabulary)
        budget = 20 * vocabulary * 4
        attach(model, lossmith.CrossEntropyLoss(), materialize_logits=materialize, memory_budget=budget)
        trainer = Trainer(model, arguments(tmp_path, **sizes), train_dataset=rows(), eval_dataset=rows())
        with Largest() as largest:
            found[materialize] = trainer.evaluate()["eval_loss"], largest.elements
        assert (model.eval()(**batch()).logits is None) == (materialize is False)
        assert model(batch()["input_ids"]).logits is not None  # without labels
    num_logits = batch(8)["labels"].numel() * vocabulary
    assert found[False][1] < num_logits <= found[None][1] == found[True][1]
    assert found[False][0] == pytest.approx(found[True][0], rel=1e-5)

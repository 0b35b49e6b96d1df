"""Mixtures of experts, whose weights have other names in a checkpoint: they come back as they were."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from huggingface_models import HEADS, SMALL, V, assert_same, make
from huggingface_trainers import arguments, rows, split
from safetensors.torch import load_file

import lossmith
from lossmith.integrations.huggingface import LossTrainer, attach
from lossmith.integrations.huggingface.attachment import attached_to
from lossmith.integrations.huggingface.trainer import load_renamed, names_in

MOE = {"use_moe_balancing": True, "num_experts": 4, "moe_top_k": 2}


def qwen3_moe():
    torch.manual_seed(0)
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **HEADS, **own))


MODELS = {"mixtral": lambda: make("mixtral"), "qwen3_moe": qwen3_moe}


def make_trainer(folder, name="mixtral", **options) -> LossTrainer:
    defaults = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.01, "optim": "adamw_torch", **split(4)}
    own = {"save_strategy": "steps", "lr_scheduler_type": "linear"}
    args = arguments(folder, **{**own, **defaults, **options})
    loss = lossmith.UnifiedLoss(V, **MOE)
    return LossTrainer(
        loss=loss, model=MODELS[name](), args=args, train_dataset=rows(32), eval_dataset=rows()
    )


def whole_state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_mixture_of_experts_is_the_same_to_the_last_bit(name, tmp_path):
    whole = make_trainer(tmp_path, name)
    whole.train()
    saved = names_in(tmp_path / "checkpoint-2")
    assert saved == set(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert not saved <= whole.model.state_dict().keys()  # else there is nothing to test
    resumed = make_trainer(tmp_path, name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert resumed.state.log_history[-1]["step"] == 4


def test_what_is_loaded_is_what_was_saved(tmp_path):
    """Of every weight, before a step is taken; and a checkpoint in several files as well."""
    trained = make_trainer(tmp_path)
    trained.train()
    expected = whole_state(trained.model)
    fresh = whole_state(make("mixtral"))
    assert all(not torch.equal(value, fresh[name]) for name, value in expected.items())
    trained.model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    for folder in ("checkpoint-4", "shards"):
        other = make_trainer(tmp_path)
        addresses = [parameter.data_ptr() for parameter in other.model.parameters()]
        other._load_from_checkpoint(str(tmp_path / folder))
        assert_same(other.model.state_dict(), expected, rtol=0, atol=0)
        assert [parameter.data_ptr() for parameter in other.model.parameters()] == addresses
        assert attached_to(other.model).objective is other.loss


def test_the_best_mixture_of_experts_comes_back(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 3}
    trainer = make_trainer(
        tmp_path, max_steps=3, learning_rate=50.0, optim="sgd", load_best_model_at_end=True, **options
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-3")
    expected = transformers.MixtralForCausalLM.from_pretrained(best).state_dict()
    assert_same(trainer.model.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_weights_that_are_sharded_are_left_to_the_trainer(how, tmp_path, monkeypatch):
    """Each rank has a part of them, and their checkpoint another form."""
    trainer = make_trainer(tmp_path)
    make("mixtral", num_hidden_layers=1).save_pretrained(tmp_path)  # would be refused, if it were read
    monkeypatch.setattr(trainer, how, True)
    loaded = []
    monkeypatch.setattr(
        transformers.Trainer, "_load_from_checkpoint", lambda _, folder, model: loaded.append(folder)
    )
    trainer._load_from_checkpoint(str(tmp_path))
    assert loaded == [str(tmp_path)]


def test_models_that_keep_their_names_are_left_to_the_trainer(tmp_path):
    model = attach(make("llama"), lossmith.CrossEntropyLoss())
    model.save_pretrained(tmp_path)
    before = whole_state(model)
    assert not load_renamed(model, tmp_path)
    assert not load_renamed(torch.nn.Linear(2, 2), tmp_path)
    assert not load_renamed(model, tmp_path / "nothing")
    assert_same(model.state_dict(), before, rtol=0, atol=0)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make("mixtral", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks \d+ weights of this MixtralForCausalLM, model\.layers\.1.*would"
    ):
        load_renamed(make("mixtral"), tmp_path)

"""A model that transformers has split by tensor parallelism trains over its head's shards, without logits."""

import os
import warnings

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from huggingface_models import assert_same

import lossmith
from lossmith.integrations.huggingface import attach
from ranks import on_two_ranks

V = 37  # the second rank has fewer
LOSSES = {
    "plain": lossmith.CrossEntropyLoss,
    "pipeline": lambda: lossmith.LossModifierPipeline(
        [lossmith.EntropyModifier({}), lossmith.TargetSmoothingModifier({})]
    ),
    "unified": lambda: lossmith.UnifiedLoss(V, use_ngram_penalty=True, use_focal_loss=True, z_loss=0.01),
}


def config(**options):
    return transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, **options,
    )  # fmt: skip


def trained(model, make):
    """Loss and gradients, and whether there were logits."""
    attach(model.double().train(), make())
    ids = torch.randint(V, (3, 8), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3] = -100
    found = {}
    for _ in range(2):  # the first batch shows what the model does to its logits
        model.zero_grad()
        output = model(input_ids=ids, labels=labels)
        output.loss.backward()
        found["logits"] = output.logits is not None
    gradients = {name: p.grad for name, p in model.named_parameters()}
    found["split"] = hasattr(model.lm_head.weight, "placements")
    found["gradients"] = {
        n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()
    }
    return {**found, "loss": output.loss.detach()}


def of_shards(rank, folders):
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")  # as torchrun sets them
    kind = transformers.AutoModelForCausalLM
    return {
        (name, of_folder): trained(kind.from_pretrained(folder, tp_plan="auto"), make)
        for of_folder, folder in folders.items()
        for name, make in LOSSES.items()
    }


@pytest.mark.slow
def test_it_trains_as_one_process_does(tmp_path):
    folders, expected = {}, {}
    for tied in (False, True):
        folders[tied] = str(tmp_path / f"model-{tied}")
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config(tie_word_embeddings=tied)).save_pretrained(folders[tied])
        for name, make in LOSSES.items():
            whole = transformers.AutoModelForCausalLM.from_pretrained(folders[tied])
            expected[name, tied] = trained(whole, make)
    for found in on_two_ranks(of_shards, tmp_path, folders):
        assert found.keys() == expected.keys()
        for case, run in found.items():
            assert run["split"], case
            assert not run["logits"], case
            torch.testing.assert_close(run["loss"], expected[case]["loss"], rtol=1e-10, atol=1e-12)
            assert_same(run["gradients"], expected[case]["gradients"], rtol=1e-9, atol=1e-11)

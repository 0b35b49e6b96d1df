"""Tiny models of transformers with random weights, batches for them, and their losses by hand."""

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

V, D, T = 40, 16, 12
SMALL = {"vocab_size": V, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **HEADS, **options}))


def gpt2(**options):
    sizes = {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 32}
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **ids, **NO_DROPOUT, **options}))


def qwen3(**options):
    own = {"head_dim": 8, "tie_word_embeddings": True}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**SMALL, **HEADS, **own, **options}))


def mixtral(**options):
    own = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**SMALL, **HEADS, **own, **options})
    )
    model.set_experts_implementation("eager")  # the others have no fp64
    return model


MODELS = {"llama": llama, "gpt2": gpt2, "qwen3": qwen3, "mixtral": mixtral}


def make(name: str, dtype: torch.dtype = torch.float32, **options):
    """A model that is the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name](**options).to(dtype)
        for parameter in model.parameters():  # initialised at 0.02, nothing would differ much
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        return model


def batch(num_rows: int = 4, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """Rows of different lengths, padded at one side; some tokens of the text have no target either."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (num_rows, T), generator=rng)
    lengths = torch.randint(4, T + 1, (num_rows, 1), generator=rng)
    mask = (torch.arange(T) < lengths).long()
    if side == "left":
        mask = mask.flip(-1)
    ids = ids.masked_fill(mask == 0, 0)
    untaught = torch.rand((num_rows, T), generator=rng) < 0.2
    labels = ids.masked_fill((mask == 0) | untaught, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def shifted(labels: Tensor, by: int = 1) -> Tensor:
    """labels[t + by] at t, -100 at the end."""
    return F.pad(labels[:, by:], (0, by), value=-100)


def mean_nll(logits: Tensor, targets: Tensor, num_tokens: Tensor, **options) -> Tensor:
    """Naively: cross-entropy over the tokens with a target."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", **options) / num_tokens


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """What ``backward`` left behind."""
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    """The same names, and numbers as close as said."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance)

"""Models that are each special in some way, and what to look at them with."""

import torch
import transformers
from huggingface_models import D, V, make, shifted
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

BART = {
    "vocab_size": V,
    "d_model": D,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else [result]:
            if isinstance(found, torch.Tensor):
                self.elements = max(self.elements, found.numel())
        return result


def bart(**options):
    torch.manual_seed(0)
    return transformers.BartForCausalLM(transformers.BartConfig(**BART, **NO_DROPOUT, **IDS, **options))


def aligned(inputs):
    """The next token as the label of each."""
    return {**inputs, "labels": shifted(inputs["labels"])}


def does(what, base=transformers.LlamaForCausalLM):
    """A model that does ``what`` to its logits."""

    class Model(base):
        def __init__(self, config):
            super().__init__(config)
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
            output = super().forward(input_ids, attention_mask, **inputs)
            output["logits"] = what(self, output["logits"])
            if labels is not None:
                output["loss"] = self.loss_function(output["logits"], labels, self.config.vocab_size)
            return output

    torch.manual_seed(0)
    return Model(make("llama").config).train()


def capped(model, z):
    return 0.05 * torch.tanh(z / 0.05)


def learned(model, z):
    return z * model.factor


def later(model, z):
    return torch.cat([z[:, :2], 2 * z[:, 2:]], 1)


def empty(kind=transformers.LlamaForCausalLM):
    with torch.device("meta"):
        return kind(make("llama").config)


def filled(model):
    """With the weights that it should have."""
    theirs = make("llama")
    model.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    for module, other in zip(model.modules(), theirs.modules(), strict=False):
        for name, buffer in other.named_buffers(recurse=False):
            module.register_buffer(name, buffer.clone(), persistent=False)
    return model.train()

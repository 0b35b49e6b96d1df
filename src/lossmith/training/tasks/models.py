"""The models: Llama, Mixtral or ModernBERT of any size, made from a configuration without downloads."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    PreTrainedModel,
)

from lossmith.components.moe import MoEBalance
from lossmith.training.config.keys import TrainConfig

INIT_STD = 0.02
NORM_EPS = 1e-6
ROPE_THETA = 10_000.0
GLOBAL_EVERY = 4  # layers of a bidirectional model
NEIGHBOURS = 4  # tokens that its other layers attend to, half on either side


# Our keys and their names in the configurations of transformers.
SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
EXPERTS = {"num_experts": "num_local_experts", "moe_top_k": "num_experts_per_tok"}


def _shape(config: TrainConfig, end_of_text: int) -> dict[str, Any]:
    """What all models' configurations have in common."""
    sizes = {name: getattr(config, key) for key, name in SIZES.items()}
    special = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": None}
    return {**sizes, **special, "attention_dropout": config.dropout}


def make_language_model(
    config: TrainConfig, end_of_text: int, never_generated: Sequence[int] = ()
) -> PreTrainedModel:
    """A causal model whose initial loss is close to log V.

    Its embeddings are not tied: after 300 steps on the default text the tied model was at 2.08 bits per
    byte, the untied one at 1.92.

    Args:
        config: gives the sizes and the experts.
        end_of_text: the token before and after every document.
        never_generated: tokens that generation leaves out.
    """
    shape = _shape(config, end_of_text) | {
        "intermediate_size": mlp_width(config.n_embd),
        "num_key_value_heads": config.n_head,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": False,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "use_cache": False,
    }
    model: PreTrainedModel
    if config.experts is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        shape |= zip(EXPERTS.values(), config.experts, strict=True)
        model = MixtralForCausalLM(MixtralConfig(**shape))
    # Each layer adds to the residual stream twice; else its variance would grow with depth (GPT-2).
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            parameter.data.mul_(1 / math.sqrt(2 * config.n_layer))
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        suppress_tokens=list(never_generated) or None,
    )
    return model


def choose_experts_by_bias(model: PreTrainedModel, balance: MoEBalance) -> None:
    """Let every router of a mixture of experts choose with the bias of its layer."""
    for i, layer in enumerate(model.model.layers):

        def choose(
            router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor], i: int = i
        ) -> tuple[Tensor, Tensor, Tensor]:
            gate_logits = output[0]
            indices, weights = balance.select(gate_logits, layer=i)
            return gate_logits, weights / weights.sum(-1, keepdim=True), indices

        layer.mlp.gate.register_forward_hook(choose)


def make_bidirectional_model(
    model_class: type[PreTrainedModel],
    config: TrainConfig,
    end_of_text: int,
    cls: int,
    num_positions: int,
    **head: Any,
) -> PreTrainedModel:
    """A ModernBERT with any of its heads whose initial loss is close to that of a guess.

    Three layers in four attend only to neighbouring tokens. With full attention everywhere and the library's
    narrow initialisation (0.02 at any width), small models learn nothing but token frequencies for hundreds
    of steps.

    Args:
        model_class: the class with the wanted head.
        config: gives the sizes.
        end_of_text, cls: the tokens before every document, and before a sequence.
        num_positions: the longest sequence it can read.
        head: options of the head, such as `id2label`.
    """
    is_local = [(layer + 1) % GLOBAL_EVERY and layer + 1 < config.n_layer for layer in range(config.n_layer)]
    shape = _shape(config, end_of_text) | {
        "max_position_embeddings": num_positions,
        "intermediate_size": 2 * config.n_embd,
        "layer_types": ["sliding_attention" if local else "full_attention" for local in is_local],
        "local_attention": NEIGHBOURS,
        "initializer_range": 1 / math.sqrt(config.n_embd),
        "classifier_pooling": "mean",
        "cls_token_id": cls,
        "sep_token_id": None,
    }
    model = model_class(ModernBertConfig(**shape, **head))
    # The input embedding is normalised, but in a masked language model it is also the unembedding.
    narrow: list[Any] = [model.get_input_embeddings(), getattr(model, "classifier", None)]
    for module in filter(None, narrow):
        torch.nn.init.normal_(module.weight, std=INIT_STD)
    return model


def mlp_width(n_embd: int) -> int:
    """Llama's 8/3 of the width, rounded up to a multiple of 32 so that matrix kernels stay aligned."""
    return 32 * math.ceil(8 * n_embd / 3 / 32)

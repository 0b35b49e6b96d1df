"""Every causal and multimodal architecture of transformers that is installed, in a size that runs at once."""

import gc
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

MAPPINGS = ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT")
V, T = 96, 8
MOST_PARAMETERS = 20_000_000

# What configurations call their sizes.
SIZES = {
    32: "hidden_size d_model n_embd embed_dim dim emb_dim word_embed_proj_dim out_hidden_size projection_dim "
    "text_hidden_size vision_hidden_size encoder_hidden_size attention_hidden_size embedding_size output_dim "
    "projector_hidden_size image_text_hidden_size patch_embed_hidden_size hidden_dim hidden_size_global "
    "image_size",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff n_inner mlp_dim ffn_hidden_size dim_ff "
    "dense_intermediate_size intermediate_size_mlp shared_intermediate_size",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size",
    64: "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions num_position_embeddings",
    50: "max_source_positions",
    16: "qk_head_dim num_mel_bins mamba_d_head mamba_head_dim",
    8: "head_dim swa_head_dim global_head_dim d_kv kv_channels dim_head linear_head_dim attention_head_dim "
    "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim o_lora_rank index_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_d_state ssm_state_size state_size mamba_chunk_size "
    "patch_size sliding_window sliding_window_size chunk_size",
    4: "num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads mamba_n_heads "
    "mamba_num_heads num_experts n_routed_experts num_local_experts moe_num_experts index_topk mamba_dt_rank "
    "time_step_rank rotary_dim num_query_tokens",
    2: "num_hidden_layers n_layer num_layers n_layers depth encoder_layers decoder_layers num_decoder_layers "
    "layers num_blocks num_encoder_layers vision_layers num_experts_per_tok num_experts_per_token moe_topk "
    "moe_top_k moe_k linear_num_key_heads index_n_heads swa_num_key_value_heads eos_token_id sep_token_id",
    1: "n_group topk_group num_expert_group first_k_dense_replace n_groups mamba_n_groups bos_token_id "
    "decoder_start_token_id cls_token_id",
    0: "num_nextn_predict_layers num_mtp_modules num_kv_shared_layers pad_token_id",
}
NAMED = {name: size for size, names in SIZES.items() for name in names.split()}
A_LAYER_EACH = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta",
    "indexer_types", "moe_layers")
OWN: dict[str, dict[str, Any]] = {}


def names() -> list[str]:
    """The classes' names."""
    found: set[str] = set()
    for mapping in MAPPINGS:
        for name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            found |= {name} if isinstance(name, str) else set(name)
    return sorted(found)


def config_of(cls: type[PreTrainedConfig], special: list[int] | None = None) -> dict[str, Any]:
    """Options of a small configuration; those inside it are small too."""
    special = list(range(V - 40, V)) if special is None else special
    default, options = cls(), {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            options[name] = config_of(type(value), special)
        elif name.startswith("_") or isinstance(value, bool) or value is None:
            continue
        elif name == "vocab_size":
            options[name] = V
        elif name == "num_key_value_heads":
            options[name] = 4 if value == getattr(default, "num_attention_heads", None) else min(value, 2)
        elif name in A_LAYER_EACH and isinstance(value, list | tuple) and value:
            kinds = list(dict.fromkeys(value))
            options[name] = (kinds + kinds)[:2]
        elif name == "eos_token_id" and isinstance(value, list | tuple):
            options[name] = [2]
        elif name in NAMED and isinstance(value, int) and value:
            options[name] = NAMED[name]
        elif isinstance(value, int) and value > 3 and name.endswith(("_token_id", "_token_index")):
            options[name] = special.pop()
        elif isinstance(value, float) and "drop" in name:
            options[name] = 0.0
    return merged(options, OWN.get(cls.model_type, {}))


def merged(options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for name, value in more.items():
        inside = options.get(name)
        options[name] = merged(inside, value) if isinstance(value, dict) and isinstance(inside, dict) and not name.startswith("rope") else value
    return options


def make(name: str):
    """A model with random weights, the same every time.

    Raises:
        Exception: of any kind, where the class cannot be made this way.
    """
    cls = getattr(transformers, name)
    config = cls.config_class(**config_of(cls.config_class))
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in cls(config).parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"{num_parameters / 1e6:.0f} million parameters")
    gc.collect()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(cls.config_class(**config_of(cls.config_class)))


def text(model) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V - 40, (2, T), generator=rng)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=rng) < 0.2, -100)
    return {"input_ids": ids, "labels": labels}

"""Every causal and multimodal architecture of the installed transformers, in a size that trains at once, and
how ``attach`` fares with it. ``scripts/architectures`` prints all of them."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

import lossmith
from lossmith.integrations.huggingface import attach
from lossmith.integrations.huggingface.attachment import attached_to

MAPPINGS = ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT")
V, T = 96, 8
FIRST_SPECIAL = 56  # ids from here on are given to images, sounds and the like
LARGER = 30.0  # times what it is initialised with is the head's weight, so that a soft cap shows
TOLERANCE = 2e-5
MOST_PARAMETERS = 50_000_000

# What configurations call their sizes.
SIZES = {
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff n_inner mlp_dim ffn_hidden_size "
    "dim_ff dense_intermediate_size intermediate_size_mlp shared_intermediate_size",
    32: "hidden_size d_model n_embd embed_dim dim emb_dim word_embed_proj_dim out_hidden_size projection_dim "
    "text_hidden_size vision_hidden_size encoder_hidden_size attention_hidden_size embedding_size output_dim "
    "projector_hidden_size image_text_hidden_size patch_embed_hidden_size hidden_dim hidden_size_global "
    "image_size adapter_in_dim adapter_out_dim adapter_input_size",
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
A_LAYER_EACH = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "layer_rope_theta",
    "indexer_types",
    "moe_layers",
)

# What the names do not settle, by the configuration's model_type.
LAYERS = ["linear_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
PARTED = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
PICTURES = {"base_channels": 32, "num_embeddings": 64, "channel_multiplier": [1, 1], "latent_channels": 32}
WIDER = {"attention_hidden_size": 64, "attention_head_dim": 16}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 90},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3]},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGBZ": 91}, "image_token_id": 90},
    "chameleon_vqgan": PICTURES,
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "cosmos3_edge_text": PARTED,
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 90}, "image_token_id": 90},
    "emu3_vqgan": PICTURES | {"latent_channels": 4, "codebook_size": 64},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 24],
        "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]},
    },
    "exaone4_5": {"text_config": {"model_type": "exaone4"}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": {
        "vocab_size_per_layer_input": V,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 48,
    },
    "gemma4_text": {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8},
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "glm4v_text": PARTED,
    "glm5_next_text": {"index_kpool": 4},
    "glm_ocr_text": PARTED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": LAYERS},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}},
    "instructblip": {"image_token_index": 90},
    "instructblipvideo": {"video_token_index": 90},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus_vqgan": PICTURES,
    "kosmos-2": {"latent_query_num": 4},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 32}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mimi": {"upsample_groups": 32},
    "ministral": {"head_dim": 8},
    "mistral4": {"qk_head_dim": 16, "head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4, "depths": [1] * 4, "hidden_sizes": [8] * 4},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}}},
    "nemotron": {"num_key_value_heads": 4},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl_text": PARTED,
    "prophetnet": {"disable_ngram_loss": True, "eps": 0.0},
    "qwen2_5_omni_text": PARTED,
    "qwen2_5_vl_text": PARTED,
    "qwen2_vl_text": PARTED,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 1,
        "hc_lowrank": 8,
        "ple_embed_dim": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": T,
    },
    "step3p5": {"sliding_window": 8, "share_expert_dim": 24, "num_sliding_attention_heads": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "depths": [1] * 7},
    "xlstm": {"embedding_dim": 32, "qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        **WIDER,
    },
    "zamba2": {"hybrid_layer_ids": [1], "mamba_headdim": 8, **WIDER},
    "zaya": {"num_experts_per_tok": 1},
}


def names() -> list[str]:
    """The classes' names."""
    found: set[str] = set()
    for mapping in MAPPINGS:
        for name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            found |= {name} if isinstance(name, str) else set(name)
    return sorted(found)


# ── models ────────────────────────────────────────────────────────────────────────────────────────


def options_of(cls: type[PreTrainedConfig], special: list[int] | None = None) -> dict[str, Any]:
    """Options of a small configuration; those inside it are small too."""
    special = list(range(FIRST_SPECIAL, V)) if special is None else special
    default, options = vars(cls()), {}
    for name, value in default.items():
        if isinstance(value, PreTrainedConfig):
            options[name] = options_of(type(value), special)
        elif name.startswith("_") or isinstance(value, bool) or value is None:
            continue
        elif name == "vocab_size":
            options[name] = V
        elif name == "num_key_value_heads":
            options[name] = 4 if value == default.get("num_attention_heads") else min(value, 2)
        elif name in A_LAYER_EACH and isinstance(value, list | tuple) and value:
            options[name] = (2 * list(dict.fromkeys(value)))[:2]
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
        options[name] = merged(inside, value) if isinstance(inside, dict) else value
    return options


def make(name: str, *, most: float = MOST_PARAMETERS):
    """A model with random weights, the same every time.

    Raises:
        Exception: of any kind, where the class cannot be made this way.
    """
    cls: Any = getattr(transformers, name)

    def build():
        return cls(cls.config_class(**options_of(cls.config_class)))

    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build().parameters())
    if size > most:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "weight", None), torch.Tensor):
        head.weight.data.mul_(LARGER)
    return model


def batch_of(model) -> dict[str, Any]:
    """A batch of text with labels, and with pictures where the model does not do without."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, FIRST_SPECIAL, (2, T), generator=rng)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=rng) < 0.2, -100)
    taken = inspect.signature(type(model).forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in taken:
            inputs[name] = torch.zeros_like(ids)
    if "use_cache" in taken:
        inputs["use_cache"] = False
    if type(model).__name__ in WITH_PICTURES:
        WITH_PICTURES[type(model).__name__](inputs, model.config, torch.rand(2, 3, 32, 32, generator=rng))
    return inputs


def picture(inputs: dict[str, Any], config: Any, pixels: torch.Tensor) -> None:
    inputs["pixel_values"] = pixels


def queries(inputs: dict[str, Any], config: Any, pixels: torch.Tensor) -> None:
    """As many tokens as there are queries stand for the picture."""
    inputs["input_ids"][:, : config.num_query_tokens] = 90
    inputs["labels"][:, : config.num_query_tokens] = -100
    inputs["pixel_values"] = pixels


def instructed(inputs: dict[str, Any], config: Any, pixels: torch.Tensor) -> None:
    queries(inputs, config, pixels)
    inputs["qformer_input_ids"] = torch.full((2, 3), 5)


def film(inputs: dict[str, Any], config: Any, pixels: torch.Tensor) -> None:
    instructed(inputs, config, pixels[:, None])


def in_places(inputs: dict[str, Any], config: Any, pixels: torch.Tensor) -> None:
    inputs["pixel_values"] = pixels
    inputs["image_embeds_position_mask"] = torch.arange(T).expand(2, T) < config.latent_query_num


def in_a_row(inputs: dict[str, Any], config: Any, pixels: torch.Tensor) -> None:
    inputs["pixel_values"] = pixels[:, None]
    inputs["image_attention_mask"] = torch.ones(2, T, 1, dtype=torch.long)


WITH_PICTURES: dict[str, Callable[[dict[str, Any], Any, torch.Tensor], None]] = {
    "Blip2ForConditionalGeneration": queries,
    "BlipForConditionalGeneration": picture,
    "GitForCausalLM": picture,
    "IdeficsForVisionText2Text": in_a_row,
    "InstructBlipForConditionalGeneration": instructed,
    "InstructBlipVideoForConditionalGeneration": film,
    "Kosmos2ForConditionalGeneration": in_places,
}


# ── how they fare ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outcome:
    """How an architecture fared.

    Attributes:
        name: of its class.
        kind: ``exact``, ``wrong``, ``refused`` or ``not run``.
        note: why, or how it differs from most.
    """

    name: str
    kind: str
    note: str = ""


def compare(name: str) -> Outcome:
    """The loss and the gradients of ``attach`` against the model's own, plain cross-entropy both."""
    plain = lossmith.CrossEntropyLoss()
    try:
        if "labels" not in inspect.signature(getattr(transformers, name).forward).parameters:
            return Outcome(name, "refused", "it takes no labels")
        with torch.device("meta"):
            empty = make(name, most=torch.inf)
    except Exception as error:
        return Outcome(name, "not run", f"cannot be made: {short(error)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attach(empty, plain)
        except (TypeError, ValueError) as error:
            return Outcome(name, "refused", short(error))
    try:
        model = make(name).train()
        inputs = batch_of(model)
        expected, of_own = most_precisely(model, inputs)
    except Exception as error:
        return Outcome(name, "not run", f"its own loss fails: {short(error)}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        attach(model, plain)
        try:
            found, of_ours = loss_and_gradients(model, inputs)
        except (TypeError, ValueError) as error:
            return Outcome(name, "refused", f"at the first batch: {short(error)}")
    error = difference(found, expected, of_ours, of_own)
    if not error < TOLERANCE:
        return Outcome(name, "wrong", f"off by {error:.1e}")
    attached: Any = attached_to(model)
    notes = ["labels at their own positions"] if attached.shift == 0 else []
    notes += [f"all logits, as {attached.fused.why_not}"] if attached.fused.why_not else []
    if any("could not be tried" in str(warning.message) for warning in said):
        notes.append("not tried on text alone, so the first batch is looked at")
    return Outcome(name, "exact", "; ".join(notes))


def most_precisely(model, inputs):
    """In fp64 where the model has it; experts in groups do not."""
    try:
        return loss_and_gradients(model.double(), to(torch.float64, inputs))
    except RuntimeError:
        return loss_and_gradients(model.float(), inputs)


def to(dtype: torch.dtype, inputs: dict[str, Any]) -> dict[str, Any]:
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[name] = value.to(dtype)
    return inputs


def loss_and_gradients(model, inputs):
    torch.manual_seed(1)
    numpy.random.seed(1)  # noqa: NPY002  (BigBird draws from it)
    model.zero_grad()
    loss = model(**inputs)["loss"]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def difference(found, expected, of_ours, of_own) -> float:
    """The largest error, relative to the loss or to the largest gradient; NaN where one is."""
    if of_ours.keys() != of_own.keys():
        return torch.inf
    largest = max(gradient.abs().max() for gradient in of_own.values())
    errors = [(of_ours[name] - of_own[name]).abs().max() / largest for name in of_own]
    return float(torch.stack([(found - expected).abs() / expected.abs(), *errors]).max())


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"

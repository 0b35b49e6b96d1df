"""A batch with all that a UnifiedLoss may want, and what its parts should be."""

from types import SimpleNamespace

import torch

import reference
import reference_components as naive

IGNORE, B, T, V, D, E = -100, 2, 24, 11, 6, 4

# As the documentation has them.
DEFAULTS = {
    "hidden_size": None,
    "primary_loss_type": "deepseek",
    "label_smoothing": 0.0,
    "ignore_index": IGNORE,
    "initial_temperature": 1.0,
    "adaptive_temperature": False,
    "backend": None,
    "temperature_bounds": (0.5, 2.0),
    "use_mtp": False,
    "num_future_tokens": 3,
    "mtp_weight": 0.1,
    "mtp_type": "deepseek",
    "shared_projection": False,
    "adaptive_threshold": 0.7,
    "adaptive_weight_range": (0.5, 1.5),
    "use_ngram_penalty": False,
    "ngram_size": 4,
    "ngram_penalty_weight": 0.1,
    "ngram_window_size": 50,
    "use_immediate_repetition_penalty": False,
    "immediate_repetition_weight": 0.5,
    "immediate_repetition_threshold": 2,
    "eos_token_id": None,
    "pad_token_id": None,
    "min_sequence_length": 20,
    "eos_penalty_weight": 0.05,
    "use_moe_balancing": False,
    "num_experts": None,
    "gradient_balance_weight": 0.1,
    "target_expert_usage": None,
    "moe_top_k": None,
    "moe_num_layers": None,
    "moe_balance_mode": "loss",
    "router_z_loss_weight": 0.0,
    "use_focal_loss": False,
    "focal_gamma": 2.0,
    "focal_alpha": 1.0,
    "focal_weight": 0.2,
    "focal_mode": "add",
    "use_diversity_loss": False,
    "diversity_weight": 0.05,
    "use_contrastive_loss": False,
    "contrastive_weight": 0.1,
    "contrastive_temperature": 0.07,
    "contrastive_margin": 0.5,
    "use_auxiliary_loss": False,
    "auxiliary_weight": 0.1,
    "z_loss": 0.0,
    "reduction": "mean",
    "shift": None,
    "empty": "zero",
    "track_statistics": True,
}


def inputs() -> dict:
    rng = torch.Generator().manual_seed(7)

    def tensor(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)

    targets = torch.randint(V, (B, T), generator=rng)
    targets[:, 5:12] = 3
    targets[0, 20:] = IGNORE
    return {
        "logits": tensor(B, T, V),
        "targets": targets,
        "input_ids": torch.randint(3, (B, T), generator=rng),
        "hidden_states": tensor(B, T, D),
        "gate_logits": tensor(B, T, E),
        "expert_outputs": tensor(B, T, E, D),
        "contrastive_pairs": (tensor(4, D), tensor(4, D)),
        "confidence_scores": torch.rand(B, T, generator=rng, dtype=torch.float64, requires_grad=True),
    }


def naive_parts(loss_fn, given: dict, **flags) -> dict[str, torch.Tensor]:
    """The parts of ``UnifiedLoss(V, **flags)`` by their formulas; ``loss_fn`` has the heads' weights."""
    o = SimpleNamespace(**DEFAULTS | flags)
    logits, targets = given["logits"], aligned(given["targets"], o)
    tempered = logits / o.initial_temperature
    valid, scale = targets != IGNORE, naive.scale_of(targets, o.reduction)

    def total(values):
        return (torch.where(valid, values, 0.0) * scale).sum()

    def of_tokens(**options):
        return reference.cross_entropy(tempered, targets, reduction="none", **options)

    scores = given.get("confidence_scores")
    certainty = logits.softmax(-1).amax(-1) if scores is None else scores
    weight = naive.confidence_weight(certainty.detach(), o.adaptive_threshold, *o.adaptive_weight_range)
    is_adaptive = o.primary_loss_type == "adaptive_mtp"
    weighs_heads = is_adaptive or o.mtp_type == "adaptive"
    replaced = o.use_focal_loss and o.focal_mode == "replace"
    main = of_tokens(label_smoothing=o.label_smoothing, focal_gamma=o.focal_gamma if replaced else 0.0)
    main = main * weight if is_adaptive else main
    parts = {"main_loss": total(main + o.z_loss * logits.logsumexp(-1) ** 2)}
    if o.use_mtp:
        mtp = loss_fn.components["mtp_loss"].component
        heads = head_logits(mtp, given["hidden_states"], o.shared_projection)[: o.num_future_tokens]
        loss = naive.further_ahead(heads, targets, scale, weight=weight if weighs_heads else None)
        parts["mtp_loss"] = o.mtp_weight * loss
    if is_adaptive or (o.use_mtp and weighs_heads):
        of_scores = 0 * main if scores is None else naive.calibration(logits, targets, scores)
        parts["confidence_loss"] = 0.01 * total(of_scores)
    parts |= {name: w * naive.unlikelihood(logits, scale, s) for name, w, s in penalties(given, targets, o)}
    parts |= of_experts(given, o)
    if o.use_focal_loss and not replaced:
        parts["focal_loss"] = o.focal_weight * o.focal_alpha * total(of_tokens(focal_gamma=o.focal_gamma))
    if o.use_contrastive_loss:
        pairs = given.get("contrastive_pairs")
        if pairs is None:
            loss = naive.token_contrast(given["hidden_states"], o.contrastive_margin)
        else:
            loss = naive.info_nce(*pairs, o.contrastive_temperature)
        parts["contrastive_loss"] = o.contrastive_weight * loss
    if o.use_auxiliary_loss:
        log_p = tempered.log_softmax(-1)
        parts["auxiliary_loss"] = o.auxiliary_weight * total((log_p.exp() * log_p).sum(-1))
    return parts


def aligned(targets, o):
    """What each position predicts, IGNORE where nothing."""
    is_ignored = targets == o.ignore_index
    if o.pad_token_id is not None and o.pad_token_id != o.eos_token_id:
        is_ignored |= targets == o.pad_token_id
    targets = targets.masked_fill(is_ignored, IGNORE)
    steps = int(o.shift or 0)
    return torch.cat([targets[:, steps:], torch.full_like(targets[:, :steps], IGNORE)], 1)


def head_logits(mtp, hidden, is_shared: bool) -> list[torch.Tensor]:
    if not is_shared:
        return [hidden @ head.weight.t() for head in mtp.heads]
    return [(hidden + hidden @ own.weight.t() + own.bias) @ mtp.unembedding.weight.t() for own in mtp.heads]


def penalties(given: dict, targets, o):
    """(name, weight, candidates of each position)."""
    rows, one_document = targets.tolist(), [0] * T
    padding = {o.pad_token_id} - {o.eos_token_id}  # where they are one, only a mask can tell
    read = [naive.contexts(row, ids) for row, ids in zip(rows, given["input_ids"].tolist(), strict=True)]

    def of_rows(find):
        return [
            [ids - padding for ids in naive.without_targets(find(x, row), row)]
            for x, row in zip(read, rows, strict=True)
        ]

    if o.use_ngram_penalty:
        sets = of_rows(lambda x, _: naive.repeating(x, one_document, o.ngram_size, o.ngram_window_size))
        yield "ngram_penalty", o.ngram_penalty_weight, sets
    if o.use_immediate_repetition_penalty:
        sets = of_rows(lambda x, _: naive.repeated(x, one_document, o.immediate_repetition_threshold))
        yield "immediate_repetition_penalty", o.immediate_repetition_weight, sets
    if o.eos_token_id is not None:
        early = o.eos_token_id, o.min_sequence_length
        sets = of_rows(lambda _, row: naive.too_early(row, one_document, *early))
        yield "eos_penalty", o.eos_penalty_weight, sets


def of_experts(given: dict, o) -> dict[str, torch.Tensor]:
    gates = given["gate_logits"]
    layers = [z.reshape(-1, E) for z in (gates if isinstance(gates, list) else [gates])]
    parts = {}
    if o.use_moe_balancing and o.moe_balance_mode == "loss":
        pi = o.target_expert_usage or [1 / E] * E
        loss = sum(naive.balance(z, naive.top_experts(z, o.moe_top_k or 1), pi) for z in layers)
        parts["moe_balance_loss"] = o.gradient_balance_weight * loss / len(layers)
    if o.router_z_loss_weight:
        loss = sum(naive.router_z(z) for z in layers) / len(layers)
        parts["router_z_loss"] = o.router_z_loss_weight * loss
    if o.use_diversity_loss:
        parts["diversity_loss"] = o.diversity_weight * naive.diversity(given["expert_outputs"])
    return parts

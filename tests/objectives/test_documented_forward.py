"""Forward passes written for the losses of docs/migration.md run here, with only the import changed."""

from types import SimpleNamespace

import torch
from documented_case import SMALL, WIDTH, Model, batch, run, small
from documented_constructors import CONSTRUCTORS

# ── NVAMP ─────────────────────────────────────────────────────────────────────────────────────────

NVAMP = """
import torch
from lossmith import NVAMPLoss

# Initialize loss function with default parameters
criterion = NVAMPLoss()

# Or customize the balance of components
criterion = NVAMPLoss(
    alpha=1.0,    # Weight for variance-normalized component
    beta=0.02,    # Weight for cross-entropy component
    gamma=0.001,  # Weight for max loss penalty
    eps=1e-6,     # Numerical stability constant
    ignore_index=-100  # Token index to ignore in calculations
)

# During training
outputs = model(inputs)  # shape: [batch_size, seq_len, vocab_size]
targets = labels          # shape: [batch_size, seq_len]
loss = criterion(outputs, targets)
"""


def test_nvamp():
    text = batch()
    model = Model()
    left = run(NVAMP, model=lambda ids: model(ids).logits, inputs=text["input_ids"], labels=text["labels"])
    assert left.criterion.alpha == 1.0
    assert left.loss > 0
    left.loss.backward()
    assert model.head.weight.grad.any()


# ── a forward pass ────────────────────────────────────────────────────────────────────────────────

MTP_USAGE = """
# Must provide hidden_states
loss = loss_fn(
    logits=outputs.logits,
    targets=batch['labels'],
    hidden_states=outputs.hidden_states[-1]  # Last layer hidden states
)
"""

MOE_USAGE = """
# Pass MoE-specific outputs
loss = loss_fn(
    logits=outputs.logits,
    targets=batch['labels'],
    gate_logits=outputs.gate_logits,      # Router gate logits
    expert_indices=outputs.expert_indices, # Selected experts
    expert_outputs=outputs.expert_outputs  # Expert outputs
)
"""

MOE_TRAINING = """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    hidden_size=768,
    num_experts=8,

    # MoE-specific
    use_moe_balancing=True,
    gradient_balance_weight=0.1,
    target_expert_usage=0.125,  # 1/num_experts

    # Encourage diversity
    use_diversity_loss=True,
    diversity_weight=0.05,

    # Standard features
    primary_loss_type="deepseek",
    use_ngram_penalty=True
)

# Usage in training loop
outputs = model(**batch, output_hidden_states=True)
loss = loss_fn(
    logits=outputs.logits,
    targets=batch['labels'],
    gate_logits=outputs.gate_logits,      # MoE gates
    expert_indices=outputs.expert_indices, # Selected experts
    expert_outputs=outputs.expert_outputs  # Expert outputs
)
"""

MTP_TRAINING = """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    hidden_size=768,
    primary_loss_type="deepseek",

    # Enable MTP
    use_mtp=True,
    num_future_tokens=3,
    mtp_type="deepseek",  # or "adaptive"
    mtp_weight=0.1,

    # Standard components
    use_ngram_penalty=True,
    eos_token_id=tokenizer.eos_token_id
)

# Must provide hidden states
outputs = model(**batch, output_hidden_states=True)
loss = loss_fn(
    logits=outputs.logits,
    targets=batch['labels'],
    hidden_states=outputs.hidden_states[-1],  # Required for MTP
    attention_mask=batch.get('attention_mask')
)
"""

QUICK_START = """
from lossmith import UnifiedLoss

# Create a comprehensive loss function
loss_fn = UnifiedLoss(
    vocab_size=50257,
    hidden_size=768,
    primary_loss_type="deepseek",  # "standard", "deepseek", or "adaptive_mtp"
    # Enable desired features
    use_mtp=True,
    use_ngram_penalty=True,
    use_immediate_repetition_penalty=True,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id
)

# During training
loss = loss_fn(logits, targets, attention_mask=attention_mask, hidden_states=hidden_states)
loss.backward()
"""

POSITIONAL_MOE = """
loss_fn = UnifiedLoss(
    vocab_size=vocab_size,
    hidden_size=hidden_size,
    num_experts=8,
    use_moe_balancing=True,
    use_diversity_loss=True,
    use_ngram_penalty=True
)

# Pass MoE outputs during training
loss = loss_fn(
    logits, targets,
    gate_logits=outputs.gate_logits,
    expert_indices=outputs.expert_indices,
    expert_outputs=outputs.expert_outputs
)
"""


def check_learns(left: SimpleNamespace, model: Model, *more: torch.nn.Parameter) -> None:
    """The loss is finite, and reaches the model and what else is named."""
    assert left.loss.isfinite()
    if left.loss.grad_fn is not None and model.head.weight.grad is None:
        left.loss.backward()
    for parameter in (model.head.weight, model.embed.weight, *more):
        assert parameter.grad.any()


def test_mtp_usage():
    model, text = Model(SMALL, width=768), batch()
    loss_fn = run(small(CONSTRUCTORS["mtp"][1])).loss_fn
    outputs = model(**text, output_hidden_states=True)
    check_learns(run(MTP_USAGE, loss_fn=loss_fn, outputs=outputs, batch=text), model, *loss_fn.parameters())


def test_moe_usage():
    model, text = Model(), batch()
    loss_fn = run(CONSTRUCTORS["moe"][1]).loss_fn
    left = run(MOE_USAGE, loss_fn=loss_fn, outputs=model(**text), batch=text)
    check_learns(left, model, model.gate.weight)


def test_moe_training():
    model, text = Model(), batch()
    left = run(MOE_TRAINING, model=model, batch=text)
    assert list(left.loss_fn.components) == ["ngram_penalty", "moe_balance_loss", "diversity_loss"]
    check_learns(left, model, model.gate.weight, *[expert.weight for expert in model.experts])


def test_mtp_training():
    model, text = Model(SMALL, width=768), batch()
    left = run(small(MTP_TRAINING), model=model, batch=text)
    assert list(left.loss_fn.components) == ["mtp_loss", "ngram_penalty", "eos_penalty"]
    check_learns(left, model, *left.loss_fn.parameters())


def test_quick_start():
    model, text = Model(SMALL, width=768), batch()
    outputs = model(text["input_ids"], output_hidden_states=True)
    left = run(
        small(QUICK_START),
        logits=outputs.logits,
        targets=text["labels"],
        attention_mask=text["attention_mask"],
        hidden_states=outputs.hidden_states[-1],
    )
    check_learns(left, model, *left.loss_fn.parameters())


def test_moe_with_positional_arguments():
    model, text = Model(SMALL), batch()
    outputs = model(**text)
    left = run(
        POSITIONAL_MOE,
        vocab_size=SMALL,
        hidden_size=WIDTH,
        logits=outputs.logits,
        targets=text["labels"],
        outputs=outputs,
    )
    check_learns(left, model, model.gate.weight)

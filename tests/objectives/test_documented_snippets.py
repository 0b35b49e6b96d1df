"""Code that was written for the losses of docs/migration.md runs here, with only the import changed."""

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lossmith

ROOT = Path(__file__).parents[2]
EOS, PAD = 2, 1
# Three of four tokens come again and go on otherwise, and two tokens are alike: there is what to penalise.
TEXT = [5, 6, 7, 8, 5, 6, 7, 9, 9, 3, *range(10, 24)]
T, WIDTH, NUM_EXPERTS = len(TEXT), 8, 8
FULL, SMALL = 50257, 64
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)


def run(code: str, **names) -> SimpleNamespace:
    """What a block leaves behind, with stand-ins for what it does not define itself."""
    namespace = {"torch": torch, "UnifiedLoss": lossmith.UnifiedLoss, "tokenizer": TOKENIZER, **names}
    exec(compile(code, "<documented>", "exec"), namespace)
    return SimpleNamespace(**{k: v for k, v in namespace.items() if not k.startswith("__")})


def small(code: str) -> str:
    """The block with a small vocabulary, where it makes heads of 768 by 50257."""
    assert str(FULL) in code
    return code.replace(str(FULL), str(SMALL))


class Model(torch.nn.Module):
    """What the blocks want of a model, and no more."""

    def __init__(self, vocab_size: int = FULL, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, width)
        self.gate = torch.nn.Linear(width, NUM_EXPERTS)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.head = torch.nn.Linear(width, vocab_size)
        self.saves_memory = False

    def forward(self, input_ids, labels=None, attention_mask=None, output_hidden_states=False):
        hidden = self.embed(input_ids)
        gate_logits = self.gate(hidden)
        outputs = torch.stack([expert(hidden) for expert in self.experts], -2)
        weights, indices = gate_logits.softmax(-1).topk(2)
        last = hidden + (weights.unsqueeze(-1) * outputs).sum(-2)
        return SimpleNamespace(
            logits=self.head(last),
            hidden_states=(hidden, last) if output_hidden_states else None,
            gate_logits=gate_logits,
            expert_indices=indices,
            expert_outputs=outputs,
        )

    def gradient_checkpointing_enable(self) -> None:
        self.saves_memory = True


def batch() -> dict:
    """Two rows, one of them padded; labels are aligned with the inputs, logits[t] predict labels[t]."""
    text = torch.tensor([TEXT, TEXT])
    mask = torch.ones_like(text)
    mask[1, -4:] = 0
    inputs = text.roll(1, -1)
    inputs[:, 0] = 4
    return {"input_ids": inputs, "labels": text.masked_fill(mask == 0, -100), "attention_mask": mask}


def tensors(vocab_size: int, width: int = WIDTH) -> dict:
    """What any component may read, each with a gradient."""
    rng = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=rng).requires_grad_()

    return {
        "logits": tensor(1, T, vocab_size),
        "hidden_states": tensor(1, T, width),
        "gate_logits": tensor(1, T, NUM_EXPERTS),
        "expert_outputs": tensor(1, T, 2, WIDTH),
        "additional_logits": tensor(2, 1, T, vocab_size),
        "confidence_scores": torch.rand(1, T, generator=rng).requires_grad_(),
    }


# The input that a part has its gradient to, if not the logits.
READS = {
    "mtp_loss": "hidden_states",
    "confidence_loss": "confidence_scores",
    "moe_balance_loss": "gate_logits",
    "diversity_loss": "expert_outputs",
    "contrastive_loss": "hidden_states",
}


def check_parts(loss_fn, expected: list[str], given: dict, reads: dict = READS) -> None:
    """These parts and no others, finite, summing to the loss, each with a gradient."""
    wanted = {reads[name]: given[reads[name]] for name in expected if name in reads}
    parts = loss_fn(given["logits"], torch.tensor([TEXT]), return_detailed=True, **wanted)
    assert set(parts) == {"main_loss", *expected, "total_loss"}
    total = parts.pop("total_loss")
    assert total.isfinite()
    torch.testing.assert_close(sum(parts.values()), total)
    for name, part in parts.items():
        (gradient,) = torch.autograd.grad(part, given[reads.get(name, "logits")], retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.any(), name


# What a block makes, and the parts that it must have.
CONSTRUCTORS = {
    "standard": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="standard",
    label_smoothing=0.0  # Optional smoothing
)
""",
    ),
    "deepseek": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="deepseek",
    initial_temperature=1.0,
    adaptive_temperature=True,
    label_smoothing=0.1,
    eos_penalty_weight=0.05
)
""",
    ),
    "adaptive_mtp": (
        ["confidence_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    hidden_size=768,
    primary_loss_type="adaptive_mtp",
    adaptive_threshold=0.7,
    adaptive_weight_range=(0.5, 1.5)
)
""",
    ),
    "mtp": (
        ["mtp_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    hidden_size=768,
    use_mtp=True,
    num_future_tokens=3,      # Predict 1-3 tokens ahead
    mtp_type="deepseek",       # or "adaptive"
    mtp_weight=0.1             # Weight relative to main loss
)
""",
    ),
    "ngram": (
        ["ngram_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_ngram_penalty=True,
    ngram_size=4,                  # Check 4-grams
    ngram_penalty_weight=0.1,      # Penalty strength
    ngram_window_size=50           # Look-back window
)
""",
    ),
    "immediate": (
        ["immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=0.5,
    immediate_repetition_threshold=2  # Trigger after 2 repeats
)
""",
    ),
    "early_eos": (
        ["eos_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    eos_token_id=50256,
    min_sequence_length=20,        # Don't allow EOS before position 20
    eos_penalty_weight=0.05
)
""",
    ),
    "moe": (
        ["moe_balance_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    num_experts=8,
    use_moe_balancing=True,
    gradient_balance_weight=0.1,
    target_expert_usage=0.125  # 1/8 for 8 experts
)
""",
    ),
    "advanced": (
        ["focal_loss", "diversity_loss", "contrastive_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_focal_loss=True,
    focal_gamma=2.0,              # Focus factor
    use_diversity_loss=True,
    diversity_weight=0.05,
    use_contrastive_loss=True,
    contrastive_temperature=0.07
)
""",
    ),
    "standard_training": (
        ["ngram_penalty", "immediate_repetition_penalty", "eos_penalty"],
        """
from lossmith import UnifiedLoss

loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="deepseek",      # ⭐ Recommended

    # Temperature & smoothing
    initial_temperature=1.0,
    adaptive_temperature=True,
    label_smoothing=0.1,

    # Repetition prevention
    use_ngram_penalty=True,
    ngram_penalty_weight=0.1,
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=0.5,

    # EOS handling
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
    min_sequence_length=20,
    eos_penalty_weight=0.05
)
""",
    ),
    "anti_repetition": (
        ["ngram_penalty", "immediate_repetition_penalty", "eos_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="deepseek",

    # Strong repetition penalties
    use_ngram_penalty=True,
    ngram_size=4,
    ngram_penalty_weight=0.2,        # Higher weight
    ngram_window_size=100,

    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=1.0,  # Much higher
    immediate_repetition_threshold=2,

    # Prevent early EOS
    eos_token_id=tokenizer.eos_token_id,
    min_sequence_length=30,           # Longer minimum
    eos_penalty_weight=0.1,

    # Temperature control
    initial_temperature=1.2,          # Slightly higher
    adaptive_temperature=True
)
""",
    ),
    "temperature_bounds": (
        [],
        """
# Use safe temperature bounds
loss_fn = UnifiedLoss(
    vocab_size=50257,
    initial_temperature=1.0,  # Start at 1.0
    temperature_bounds=(0.7, 1.5)  # Narrow bounds
)
""",
    ),
    "more_components": (
        ["ngram_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="deepseek",  # Switch to DeepSeek
    label_smoothing=0.1,            # Add smoothing
    use_ngram_penalty=True,         # Add penalties
    adaptive_temperature=True       # Enable adaptation
)
""",
    ),
    "penalty_weights": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    ngram_penalty_weight=0.2,        # Increase from 0.1
    immediate_repetition_weight=1.0  # Increase from 0.5
)
""",
    ),
    "without_mtp": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_mtp=False  # Saves 5-10% memory
)
""",
    ),
    "fewer_future_tokens": (
        ["mtp_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_mtp=True,
    num_future_tokens=2,  # Reduce from 3 to 2
    shared_projection=True  # Share projection heads
)
""",
    ),
    "without_expensive": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_mtp=False,           # Disable MTP (8% speedup)
    use_focal_loss=False,    # Disable focal loss
    use_diversity_loss=False # Disable diversity loss
)
""",
    ),
    "smaller_window": (
        ["ngram_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_ngram_penalty=True,
    ngram_window_size=30  # Reduce from 50
)
""",
    ),
    "fastest": (
        ["ngram_penalty", "immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="standard",  # Fastest option
    use_ngram_penalty=True,        # Keep only cheap penalties
    use_immediate_repetition_penalty=True
)
""",
    ),
    "stronger_penalties": (
        ["ngram_penalty", "immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_ngram_penalty=True,
    ngram_penalty_weight=0.3,        # Much higher
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=1.5, # Much higher
    eos_penalty_weight=0.15          # Prevent early exit
)
""",
    ),
    "longer_sequences": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    min_sequence_length=50,  # Longer sequences
    eos_penalty_weight=0.1
)
""",
    ),
    "diversity": (
        ["diversity_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_diversity_loss=True,
    diversity_weight=0.1  # Encourage varied outputs
)
""",
    ),
    "mtp_again": (
        ["mtp_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    hidden_size=768,
    use_mtp=True,
    num_future_tokens=3,
    mtp_type="deepseek"  # or "adaptive"
)
""",
    ),
    "repetition_again": (
        ["ngram_penalty", "immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    # N-gram repetition (prevents "the the the")
    use_ngram_penalty=True,
    ngram_size=4,
    ngram_penalty_weight=0.1,
    # Immediate repetition (prevents "time time time")
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=0.5
)
""",
    ),
    "eos_again": (
        ["eos_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    eos_token_id=50256,
    min_sequence_length=20,
    eos_penalty_weight=0.05
)
""",
    ),
    "moe_again": (
        ["moe_balance_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    num_experts=8,
    use_moe_balancing=True,
    gradient_balance_weight=0.1
)
""",
    ),
    "advanced_again": (
        ["focal_loss", "diversity_loss", "auxiliary_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_focal_loss=True,
    use_diversity_loss=True,
    use_auxiliary_loss=True
)
""",
    ),
    "standard_again": (
        ["ngram_penalty", "immediate_repetition_penalty", "eos_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=vocab_size,
    primary_loss_type="deepseek",
    label_smoothing=0.1,
    use_ngram_penalty=True,
    use_immediate_repetition_penalty=True,
    eos_token_id=tokenizer.eos_token_id
)
""",
    ),
    "anti_repetition_again": (
        ["ngram_penalty", "immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=vocab_size,
    primary_loss_type="deepseek",
    # Stronger penalties
    use_ngram_penalty=True,
    ngram_penalty_weight=0.2,
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=1.0,
    eos_penalty_weight=0.1,
    min_sequence_length=30
)
""",
    ),
}
ADAPTS = ["deepseek", "standard_training", "anti_repetition", "more_components"]


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_makes_the_parts_that_it_switches_on(name):
    expected, code = CONSTRUCTORS[name]
    has_heads = name in ("mtp", "mtp_again")
    vocab_size = SMALL if has_heads else FULL
    loss_fn = run(small(code) if has_heads else code, vocab_size=FULL).loss_fn
    reads = READS
    if name == "fewer_future_tokens":  # it names no width: the heads are the model's
        reads = READS | {"mtp_loss": "additional_logits"}
    check_parts(loss_fn, expected, tensors(vocab_size, width=768 if has_heads else WIDTH), reads)
    is_adaptive = isinstance(loss_fn.base.temperature, lossmith.AdaptiveTemperature)
    assert is_adaptive == (name in ADAPTS)


def test_options_arrive():
    def component(name: str, part: str):
        return run(CONSTRUCTORS[name][1]).loss_fn.components[part]

    weighted = component("anti_repetition", "ngram_penalty")
    assert (weighted.weight, weighted.component.ngram_size, weighted.component.window_size) == (0.2, 4, 100)
    assert component("anti_repetition", "immediate_repetition_penalty").component.threshold == 2
    assert component("anti_repetition", "eos_penalty").component.min_length == 30
    assert component("advanced", "focal_loss").component.gamma == 2.0
    assert component("advanced", "contrastive_loss").component.temperature == 0.07
    primary = run(CONSTRUCTORS["adaptive_mtp"][1]).loss_fn.base
    assert (primary.threshold, primary.weight_range) == (0.7, (0.5, 1.5))
    assert run(CONSTRUCTORS["deepseek"][1]).loss_fn.base.label_smoothing == 0.1


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


# ── training loops ────────────────────────────────────────────────────────────────────────────────

TRAINING_LOOP = """
from lossmith import UnifiedLoss
import torch

# Initialize loss function
loss_fn = UnifiedLoss(
    vocab_size=config.vocab_size,
    hidden_size=config.hidden_size,
    primary_loss_type="deepseek",
    use_mtp=config.use_mtp,
    use_ngram_penalty=True,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id
)

# Training loop
for epoch in range(num_epochs):
    for batch in dataloader:
        optimizer.zero_grad()

        # Forward pass
        outputs = model(**batch, output_hidden_states=config.use_mtp)

        # Compute loss
        loss = loss_fn(
            logits=outputs.logits,
            targets=batch['labels'],
            attention_mask=batch.get('attention_mask'),
            hidden_states=outputs.hidden_states[-1] if config.use_mtp else None
        )

        # Backward pass
        loss.backward()

        # Gradient clipping (recommended)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)

        # Optimizer step
        optimizer.step()
        scheduler.step()

        # Logging
        if step % log_interval == 0:
            print(f"Step {step}, Loss: {loss.item():.4f}")
"""

SHORT_LOOP = """
# In your training script
from lossmith import UnifiedLoss

# Create loss function
loss_fn = UnifiedLoss(
    vocab_size=config.vocab_size,
    hidden_size=config.hidden_size,
    primary_loss_type="deepseek",
    use_mtp=config.use_mtp,
    use_ngram_penalty=True,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id
)

# Training loop
for batch in dataloader:
    optimizer.zero_grad()

    outputs = model(**batch, output_hidden_states=True)

    loss = loss_fn(
        logits=outputs.logits,
        targets=batch['labels'],
        attention_mask=batch.get('attention_mask'),
        hidden_states=outputs.hidden_states[-1] if config.use_mtp else None
    )

    loss.backward()
    optimizer.step()
"""


@pytest.mark.parametrize("use_mtp", [False, True])
@pytest.mark.parametrize("code", [TRAINING_LOOP, SHORT_LOOP], ids=["long", "short"])
def test_training_loop(code, use_mtp, capsys):
    torch.manual_seed(0)
    model = Model(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    names = {
        "config": SimpleNamespace(vocab_size=SMALL, hidden_size=WIDTH, use_mtp=use_mtp),
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        "dataloader": [batch(), batch(), batch()],
        "num_epochs": 4,
        "step": 0,
        "log_interval": 10,
    }
    left = run(code, **names)
    assert list(left.loss_fn.components) == [*["mtp_loss"] * use_mtp, "ngram_penalty", "eos_penalty"]
    statistics = left.loss_fn.get_loss_statistics()
    assert statistics["num_batches"] == (12 if code is TRAINING_LOOP else 3)
    assert left.loss < statistics["total_loss"]  # the last is better than the mean
    if code is TRAINING_LOOP:
        printed = [float(value) for value in re.findall(r"Step 0, Loss: ([\d.]+)", capsys.readouterr().out)]
        assert len(printed) == 12
        assert printed[-1] == pytest.approx(left.loss.item(), abs=1e-4)


# ── the parts ─────────────────────────────────────────────────────────────────────────────────────

MONITORING = """
# Get detailed breakdown
loss_dict = loss_fn(
    logits=outputs.logits,
    targets=batch['labels'],
    attention_mask=batch['attention_mask'],
    hidden_states=outputs.hidden_states[-1],
    return_detailed=True  # Return dictionary instead of scalar
)

# Access individual components
print(f"Main Loss: {loss_dict['main_loss'].item():.4f}")
print(f"MTP Loss: {loss_dict.get('mtp_loss', torch.tensor(0.0)).item():.4f}")
print(f"N-gram Penalty: {loss_dict.get('ngram_penalty', torch.tensor(0.0)).item():.4f}")
print(f"Immediate Penalty: {loss_dict.get('immediate_repetition_penalty', torch.tensor(0.0)).item():.4f}")
print(f"Total Loss: {loss_dict['total_loss'].item():.4f}")

# Backward on total loss
loss_dict['total_loss'].backward()

# Log to tensorboard/wandb
logger.log({
    'loss/main': loss_dict['main_loss'].item(),
    'loss/mtp': loss_dict.get('mtp_loss', torch.tensor(0.0)).item(),
    'loss/ngram': loss_dict.get('ngram_penalty', torch.tensor(0.0)).item(),
    'loss/total': loss_dict['total_loss'].item()
})
"""

SHORT_MONITORING = """
loss_dict = loss_fn(
    logits, targets,
    attention_mask=attention_mask,
    hidden_states=hidden_states,
    return_detailed=True
)

# Access individual components
print(f"Main Loss: {loss_dict['main_loss']}")
print(f"MTP Loss: {loss_dict.get('mtp_loss', 0)}")
print(f"N-gram Penalty: {loss_dict.get('ngram_penalty', 0)}")
print(f"Total Loss: {loss_dict['total_loss']}")

# Backward pass on total loss
loss_dict['total_loss'].backward()
"""

CONTRIBUTIONS = """
# Use detailed breakdown to identify issues
loss_dict = loss_fn(..., return_detailed=True)

# Check if any component is dominating
for key, value in loss_dict.items():
    if isinstance(value, torch.Tensor):
        print(f"{key}: {value.item():.4f}")
"""


def monitored(**flags) -> tuple[lossmith.UnifiedLoss, Model, dict]:
    model, text = Model(SMALL), batch()
    outputs = model(**text, output_hidden_states=True)
    names = {
        "outputs": outputs,
        "batch": text,
        "logits": outputs.logits,
        "targets": text["labels"],
        "attention_mask": text["attention_mask"],
        "hidden_states": outputs.hidden_states[-1],
    }
    return lossmith.UnifiedLoss(SMALL, WIDTH, **flags), model, names


def test_monitoring(capsys):
    loss_fn, model, names = monitored(use_mtp=True, use_ngram_penalty=True)
    logged = []
    left = run(MONITORING, loss_fn=loss_fn, logger=SimpleNamespace(log=logged.append), **names)
    parts = {name: value.item() for name, value in left.loss_dict.items()}
    assert logged == [
        {
            "loss/main": parts["main_loss"],
            "loss/mtp": parts["mtp_loss"],
            "loss/ngram": parts["ngram_penalty"],
            "loss/total": parts["total_loss"],
        }
    ]
    assert all(value > 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(2 * parts["total_loss"])
    assert "Immediate Penalty: 0.0000" in capsys.readouterr().out  # it is off
    assert model.head.weight.grad.any()


@pytest.mark.parametrize("use_mtp", [False, True])
def test_short_monitoring(use_mtp, capsys):
    loss_fn, model, names = monitored(use_mtp=use_mtp, use_ngram_penalty=True)
    left = run(SHORT_MONITORING, loss_fn=loss_fn, **names)
    assert ("mtp_loss" in left.loss_dict) == use_mtp
    assert ("MTP Loss: 0\n" in capsys.readouterr().out) != use_mtp
    assert model.head.weight.grad.any()


def test_contributions(capsys):
    loss_fn, _, names = monitored(use_ngram_penalty=True, use_focal_loss=True)

    def called_with_dots(*dots, **options):
        assert dots == (...,)
        return loss_fn(names["logits"], names["targets"], **options)

    left = run(CONTRIBUTIONS, loss_fn=called_with_dots)
    assert list(left.loss_dict) == ["main_loss", "ngram_penalty", "focal_loss", "total_loss"]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{name}: {value.item():.4f}" for name, value in left.loss_dict.items()]


# ── tuning and troubleshooting ────────────────────────────────────────────────────────────────────

TUNING = """
import optuna

def objective(trial):
    # Suggest hyperparameters
    ngram_weight = trial.suggest_float('ngram_weight', 0.05, 0.3)
    immediate_weight = trial.suggest_float('immediate_weight', 0.2, 1.5)
    temperature = trial.suggest_float('temperature', 0.8, 1.5)

    # Create loss function
    loss_fn = UnifiedLoss(
        vocab_size=50257,
        primary_loss_type="deepseek",
        initial_temperature=temperature,
        ngram_penalty_weight=ngram_weight,
        immediate_repetition_weight=immediate_weight,
        use_ngram_penalty=True,
        use_immediate_repetition_penalty=True
    )

    # Train and return validation loss
    val_loss = train_and_evaluate(model, loss_fn, train_loader, val_loader)
    return val_loss

# Run optimization
study = optuna.create_study(direction='minimize')
study.optimize(objective, n_trials=50)

print(f"Best hyperparameters: {study.best_params}")
"""

LEARNING_RATE = """
# Reduce learning rate
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # Lower LR
"""

CLIPPING = """
# Add gradient clipping
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
optimizer.step()
"""

INVALID_INPUTS = """
# Check for NaN in inputs
assert not torch.isnan(logits).any(), "NaN in logits"
assert not torch.isnan(targets).any(), "NaN in targets"
"""

CHECKPOINTING = """
# Enable in model
model.gradient_checkpointing_enable()
"""

PROFILING = """
import time

start = time.time()
loss = loss_fn(logits, targets)
print(f"Loss computation: {time.time() - start:.4f}s")
"""


class Study:
    """As much of a study as the block asks for: every suggestion is the lowest, then the highest."""

    best_params = None

    def optimize(self, objective, n_trials):
        assert n_trials == 50
        found = []
        for end in range(2):
            suggested: dict = {}

            def suggest_float(name, *bounds, end=end, suggested=suggested):
                suggested[name] = bounds[end]
                return bounds[end]

            value = objective(SimpleNamespace(suggest_float=suggest_float))
            found.append((value, suggested))
        self.best_params = min(found, key=lambda pair: pair[0])[1]


def test_tuning(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", SimpleNamespace(create_study=lambda direction: Study()))
    given = tensors(FULL)
    seen = []

    def train_and_evaluate(model, loss_fn, train_loader, val_loader):
        seen.append(loss_fn)
        check_parts(loss_fn, ["ngram_penalty", "immediate_repetition_penalty"], given)
        return loss_fn(given["logits"], torch.tensor([TEXT])).item()

    names = {"model": None, "train_loader": None, "val_loader": None}
    left = run(TUNING, train_and_evaluate=train_and_evaluate, **names)
    assert [loss_fn.base.temperature for loss_fn in seen] == [0.8, 1.5]
    assert [loss_fn.components["ngram_penalty"].weight for loss_fn in seen] == [0.05, 0.3]
    assert f"Best hyperparameters: {left.study.best_params}" in capsys.readouterr().out


def test_a_step_with_clipping():
    model, text = Model(SMALL), batch()
    optimizer = run(LEARNING_RATE, model=model).optimizer
    loss = lossmith.UnifiedLoss(SMALL)(model(**text).logits, text["labels"])
    before = model.head.weight.detach().clone()
    run(CLIPPING, model=model, loss=loss, optimizer=optimizer)
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert 0 < torch.cat(gradients).norm() <= 1.001
    assert not torch.equal(model.head.weight, before)


def test_invalid_inputs():
    logits, targets = torch.zeros(1, T, SMALL), torch.tensor([TEXT])
    run(INVALID_INPUTS, logits=logits, targets=targets)
    with pytest.raises(AssertionError, match="NaN in logits"):
        run(INVALID_INPUTS, logits=logits.log().log(), targets=targets)


def test_checkpointing():
    model = Model(SMALL)
    run(CHECKPOINTING, model=model)
    assert model.saves_memory


def test_profiling(capsys):
    loss_fn, _, names = monitored()
    left = run(PROFILING, loss_fn=loss_fn, **names)
    assert left.loss.isfinite()
    assert re.match(r"Loss computation: \d+\.\d{4}s", capsys.readouterr().out)


# ── the old names ─────────────────────────────────────────────────────────────────────────────────

FROM_DEEPSEEK = """
# Old
from lossmith import DeepSeekLoss
loss_fn = DeepSeekLoss(vocab_size=50257, hidden_size=768)

# New
from lossmith import UnifiedLoss
loss_fn = UnifiedLoss(vocab_size=50257, hidden_size=768, primary_loss_type="deepseek")
"""

FROM_ADAPTIVE_MTP = """
# Old
from lossmith import AdaptiveMTPLoss
loss_fn = AdaptiveMTPLoss(vocab_size=50257)

# New
from lossmith import UnifiedLoss
loss_fn = UnifiedLoss(vocab_size=50257, hidden_size=768, primary_loss_type="adaptive_mtp")
"""

FROM_ANTI_REPETITION = """
# Old
from lossmith import AntiRepetitionLoss
loss_fn = AntiRepetitionLoss(vocab_size, eos_token_id, pad_token_id)

# New
from lossmith import UnifiedLoss
loss_fn = UnifiedLoss(
    vocab_size=vocab_size,
    use_ngram_penalty=True,
    use_immediate_repetition_penalty=True,
    eos_token_id=eos_token_id,
    pad_token_id=pad_token_id
)
"""


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (FROM_DEEPSEEK, []),
        (FROM_ADAPTIVE_MTP, ["confidence_loss"]),
        (FROM_ANTI_REPETITION, ["ngram_penalty", "immediate_repetition_penalty", "eos_penalty"]),
    ],
    ids=["deepseek", "adaptive_mtp", "anti_repetition"],
)
def test_the_old_name_and_the_new_are_one_loss(code, parts):
    before, after = code.split("# New\n")
    names = {"vocab_size": FULL, "eos_token_id": EOS, "pad_token_id": PAD}
    with pytest.warns(DeprecationWarning, match="is UnifiedLoss"):
        old = run(before, **names).loss_fn
    new = run(after, **names).loss_fn
    given = tensors(FULL)
    check_parts(new, parts, given)
    losses = [loss_fn(given["logits"], torch.tensor([TEXT])) for loss_fn in (old, new)]
    assert torch.equal(*losses)
    with pytest.warns(DeprecationWarning, match="is UnifiedLoss"):
        assert type(run(code, **names).loss_fn) is lossmith.UnifiedLoss


# ── the page ──────────────────────────────────────────────────────────────────────────────────────


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table on the page of UnifiedLoss."""
    page = (ROOT / "docs" / "unified.md").read_text()
    text = re.search(rf"^## {section}\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)[1]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| `.*$", text, re.M)]


def test_the_page_lists_every_argument_with_its_default():
    parameters = inspect.signature(lossmith.UnifiedLoss).parameters
    documented = {name.strip("`"): default for name, default, _ in rows("Arguments of the constructor")}
    assert set(documented) == set(parameters)
    for name, default in documented.items():
        expected = parameters[name].default
        shown = "" if expected is inspect.Parameter.empty else f"`{expected!r}`".replace("'", '"')
        assert default == shown, name
    forward = list(inspect.signature(lossmith.UnifiedLoss.forward).parameters)[1:-1]
    documented = [name.strip("`") for name, *_ in rows("Arguments of the forward")]
    assert documented == [*forward, "segment_ids", "token_weight"]

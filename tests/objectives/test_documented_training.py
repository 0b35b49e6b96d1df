"""Training written for the losses of docs/migration.md runs here, with only the import changed."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from documented_case import FULL, SMALL, TEXT, WIDTH, Model, T, batch, check_parts, run, tensors

import lossmith

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

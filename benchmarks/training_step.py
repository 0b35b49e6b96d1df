"""A whole training step of the default run: with transformers' own loss, and with everything on.

    python benchmarks/training_step.py [--rounds 40] [--device cpu] [--csv FILE]

The model, the batch and the optimizer are those of `python train.py`. UnifiedLoss has label smoothing,
z-loss, n-gram, immediate-repetition and early-EOS penalties and focal loss; the modifiers are entropy
weighting, target smoothing, mask ratio and metrics.
"""

from __future__ import annotations

import torch
from torch import nn

import lossmith
from harness import Step, against_first, options, write_csv
from lossmith.integrations.huggingface import attach
from lossmith.training.config.keys import TrainConfig
from lossmith.training.tasks.models import make_language_model

END_OF_TEXT = 0


def unified() -> lossmith.UnifiedLoss:
    return lossmith.UnifiedLoss(
        TrainConfig.vocab_size,
        label_smoothing=0.1,
        z_loss=1e-4,
        use_ngram_penalty=True,
        use_immediate_repetition_penalty=True,
        eos_token_id=END_OF_TEXT,
        use_focal_loss=True,
    )


def modified(base: lossmith.Objective | None = None) -> lossmith.LossModifierPipeline:
    return lossmith.create_loss_modifier_pipeline(
        {
            "loss_modifiers_enabled": True,
            "entropy_modifier_enabled": True,
            "entropy_modifier_use_for_weighting": True,
            "target_smoothing_enabled": True,
            "mask_ratio_weight_enabled": True,
            "metrics_collector_enabled": True,
        },
        base=base,
    )


CONTENDERS = {
    "transformers' own loss": None,
    "CrossEntropyLoss": lossmith.CrossEntropyLoss,
    "UnifiedLoss, penalties on": unified,
    "modifiers": modified,
    "UnifiedLoss and modifiers": lambda: modified(unified()),
}


def make_step(name: str, device: str, *, materialize: bool = False) -> Step:
    """One training step: forward, backward, clipping, AdamW."""
    torch.manual_seed(0)
    config = TrainConfig()
    model: nn.Module = make_language_model(config, END_OF_TEXT).to(device).train()  # type: ignore[arg-type]
    make = CONTENDERS[name]
    if make is not None:
        attach(model, make(), materialize_logits=materialize)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(config.vocab_size, (config.batch_size, config.block_size), device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()

    return step


def main() -> None:
    chosen = options(__doc__.splitlines()[0], rounds=40)
    rows = against_first(
        "a training step of the default run",
        CONTENDERS,
        make_step,
        chosen.device,
        rounds=chosen.rounds,
        device=chosen.device,
    )
    write_csv(chosen, ["name", "ms", "x_transformers", "extra_mib"], rows)


if __name__ == "__main__":
    main()

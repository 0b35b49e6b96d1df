"""Runs as the trainer leaves them, without training."""

import json
import math
import random
from pathlib import Path
from typing import Any

PARTS = ("cross_entropy", "z_loss", "ngram_penalty", "confidence_penalty")
HOSTILE = "<script>document.title='owned'</script>"


def row_of(step: int, draw: random.Random, parts: tuple[str, ...]) -> dict[str, Any]:
    """A training row as the trainer logs it, whose parts sum to the loss."""
    values = {part: draw.random() / 10 for part in parts} | {"confidence_penalty": -0.05 * draw.random()}
    values["cross_entropy"] = 2 + 5 / (1 + step / 300) + draw.gauss(0, 0.05)
    values = {part: values[part] for part in parts}
    row = {
        "step": step,
        "loss": sum(values.values()),
        "grad_norm": draw.random(),
        "learning_rate": 1e-3 / step,
    }
    row |= {"tokens_per_second": 5000 + draw.random(), "perplexity": math.exp(values["cross_entropy"])}
    row |= {f"loss/{part}": value for part, value in values.items()}
    row |= {f"pull/{part}": abs(value) / 2 for part, value in values.items()}
    row |= {f"pull_cosine/{part}": draw.uniform(-1, 1) for part in values}
    weights = {"weight_mean": 1.0, "weight_min": 0.5 + draw.random() / 9, "weight_max": 1.5 + draw.random()}
    row |= {f"loss_modifiers/EntropyModifier.{name}": value for name, value in weights.items()}
    return row | {"moe_balance_loss/max_violation": draw.random()}


def analysis_of(token: str = " hard") -> dict[str, Any]:
    """An analysis as the trainer writes it."""
    bands = {"labels": ["0", "1-9"], "loss": [5.0, 3.0], "num_tokens": [10, 30]}
    hard = {"before": "a\nvery", "token": token, "after": " token", "predicted": token, "nll": 9.5}
    return {
        "step": 20,
        "num_tokens": 40,
        "loss": 3.5,
        "uniform_loss": math.log(300),
        "by_position": bands,
        "by_frequency": bands,
        "calibration": {"ece": 0.1, "confidence": [0.2, 0.7], "accuracy": [0.1, 0.8], "num_tokens": [10, 30]},
        "repetition": {"seq_rep_4": 0.1, "rep_128": 0.4, "text_seq_rep_4": 0.0, "text_rep_128": 0.3},
        "expert_usage": [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]],
        "hardest": [hard],
        "sample": f"Once upon {token}",
    }


def write_run(
    folder: Path,
    num_steps: int = 40,
    *,
    seed: int = 0,
    parts: tuple[str, ...] = PARTS,
    config: dict[str, Any] | None = None,
    analysis: dict[str, Any] | None = None,
    findings: tuple[str, ...] = (),
) -> Path:
    """A run's folder with a log, a configuration, and an analysis in its checkpoint."""
    draw = random.Random(seed)
    checkpoint = folder / f"checkpoint-{num_steps}"
    checkpoint.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        lines.append(row_of(step, draw, parts))
        if step % max(1, num_steps // 10) == 0:
            lines.append({"step": step, "val_loss": 2.1 + 5 / step, "perplexity": 9.0, "bits_per_byte": 1.5})
    lines += [{"finding": finding} for finding in findings]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "loss": "unified",
        "max_iters": num_steps,
        "seed": seed,
        "out_dir": str(folder),
        **(config or {}),
    }
    (folder / "config.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    (checkpoint / "analysis.json").write_text(json.dumps(analysis or analysis_of()))
    return folder

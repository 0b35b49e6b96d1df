"""The engines that train as one process does: how each is used, and what it refuses. ``python
tests/engines/engine_list.py`` writes the table of docs/distributed.md from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attached_models
import loops
import trainers
from engines_case import LOSSES


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        run: (rank) -> the steps of every loss, or what was said when one was refused.
        how: what to write.
        needs: modules that have to be there.
        of_model: how its model is made, for what is expected; None for the trainers' own.
        refuses: losses that it refuses, with words of the message.
        tolerance: how far gradients and loss may be off.
    """

    run: Callable[[int], Mapping[str, Any]]
    how: str
    needs: tuple[str, ...] = ()
    of_model: Mapping[str, Any] | None = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-6


PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
BEGIN, END = "<!-- engines -->", "<!-- end of engines -->"

TRAINER = {"needs": ("transformers", "accelerate"), "of_model": None}
ZERO = {"how": "`loss * ranks * steps`", "needs": ("deepspeed",), "tolerance": 1e-6}
ENGINES = {
    "DistributedDataParallel": Engine(loops.ddp, "`loss * ranks`"),
    "FSDP1": Engine(loops.fsdp1, "`loss * ranks`"),
    "FSDP2": Engine(loops.fsdp2, "`loss * ranks`"),
    "FSDP2, tied embeddings": Engine(loops.fsdp2_tied, "`loss * ranks`", of_model={"tied": True}),
    "FSDP2, checkpointed": Engine(loops.fsdp2_checkpointed, "`loss * ranks`"),
    "FSDP2, the head by itself": Engine(loops.fsdp2_apart, "`loss * ranks`, `head.unshard()` in the forward"),
    "FSDP2, `attach`, the head by itself": Engine(
        attached_models.fsdp2, "`loss * ranks`", needs=("transformers",), of_model=None
    ),
    "DeepSpeed ZeRO-1": Engine(loops.zero_1, **ZERO),
    "DeepSpeed ZeRO-2": Engine(loops.zero_2, **ZERO),
    "DeepSpeed ZeRO-3": Engine(loops.zero_3, **ZERO),
    "DeepSpeed ZeRO-3, `attach`": Engine(
        attached_models.zero_3, **{**ZERO, "needs": ("deepspeed", "transformers"), "of_model": None}
    ),
    "accelerate": Engine(loops.accelerate, "`loss * ranks * steps`", needs=("accelerate",)),
    "Lightning": Engine(loops.lightning, "`loss * ranks * steps`", needs=("lightning",)),
    "Fabric, DDP": Engine(loops.fabric, "`loss * ranks`", needs=("lightning",)),
    "Fabric, FSDP2": Engine(loops.fabric_fsdp2, "`loss * ranks`", needs=("lightning",)),
    "Trainer: `LossTrainer`": Engine(trainers.loss_trainer, "`loss`, by itself", **TRAINER),
    "Trainer: `LossTrainer`, FSDP1": Engine(trainers.fsdp1, "`loss`, by itself", **TRAINER),
    "Trainer: `LossTrainer`, FSDP2": Engine(trainers.fsdp2, "`loss`, by itself", **TRAINER),
    "Trainer: `LossTrainer`, DeepSpeed ZeRO-2": Engine(
        trainers.zero_2, "`loss`, by itself", **{**TRAINER, "needs": (*TRAINER["needs"], "deepspeed")}
    ),
    "Trainer: `LossTrainer`, DeepSpeed ZeRO-3": Engine(
        trainers.zero_3, "`loss`, by itself", **{**TRAINER, "needs": (*TRAINER["needs"], "deepspeed")}
    ),
    "Trainer: `attach`": Engine(
        trainers.attached, "`loss`, by itself", **TRAINER, refuses={"modifier pipeline": "divides by"}
    ),
    "Trainer: `compute_loss_func`": Engine(
        trainers.loss_function,
        "`loss`, by itself",
        **TRAINER,
        refuses={"modifier pipeline": "divides by", "UnifiedLoss": "has parameters"},
    ),
    "SFTTrainer: `LossTrainer`": Engine(
        trainers.sft_trainer,
        "`loss`, by itself",
        **{**TRAINER, "needs": ("transformers", "accelerate", "trl")},
    ),
}


def table() -> str:
    """Engine by loss, in Markdown."""
    lines = [
        f"| engine | what it is given | {' | '.join(LOSSES)} |",
        "| --- | --- |" + " --- |" * len(LOSSES),
    ]
    for name, engine in ENGINES.items():
        cells = ["refused" if loss in engine.refuses else "exact" for loss in LOSSES]
        lines.append(f"| {name} | {engine.how} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page_with_table(page: str) -> str:
    """The page with the table in its place."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))

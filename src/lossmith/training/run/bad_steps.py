"""``BadSteps``: what a run does about steps that are not finite: looks at them, says so, saves the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lossmith.training.run.bad_step import Diagnosis, look_at
from lossmith.training.run.batch_file import name_of, write_batch
from lossmith.training.run.checkpoints import checkpoints
from lossmith.training.run.folder import RunFolder
from lossmith.training.tasks.task import TokenTask
from lossmith.training.untrusted import shortened

if TYPE_CHECKING:
    from lossmith.training.run.trainer import TaskTrainer

# (step, name, sentence)
Tell = Callable[[int, str, str], None]
MOST = 3  # batches that a run looks at and saves


class BadSteps:
    """Looks at the first few steps of a run that are not finite.

    Args:
        out_dir: the run's folder.
        folder: the same, on the rank that writes.
        tell: see :class:`TaskTrainer`.

    Attributes:
        said: the last one in words, with where its batch is; empty if there was none.
    """

    def __init__(self, out_dir: Path, folder: RunFolder | None, tell: Tell):
        self.out_dir = out_dir
        self.folder = folder
        self.tell = tell
        self.said = ""
        self.num = 0

    def take(self, trainer: "TaskTrainer", step: int, is_loss: bool) -> None:
        """Look at a step whose gradients are there and that has not moved the weights yet; on all ranks.
        ``is_loss``: whether it is a loss that is not finite."""
        self.num += 1
        if self.num > MOST:
            return
        rank, num_ranks = trainer.args.process_index, trainer.args.world_size
        found = self._look(trainer, step, is_loss)
        each: list[tuple[bool, str]] = [(found.is_loss, found.said)]
        if num_ranks > 1:
            each *= num_ranks
            torch.distributed.all_gather_object(each, (found.is_loss, found.said))
        bad = [k for k, (is_loss, _) in enumerate(each) if is_loss] or [0]
        names = [name_of(step, k, num_ranks) for k in bad]
        where = self._save(trainer, found, names) if rank in bad or self.folder else ""
        self.said = f"{each[bad[0]][1]}. {where}"
        text = f"Not finite: {self.said}."
        if trainer.finite.skips and self.num == MOST:
            text += " Further ones are skipped and counted without a look."
        self.tell(step, f"not finite:{step}", text)

    def _look(self, trainer: "TaskTrainer", step: int, is_loss: bool) -> Diagnosis:
        is_alone = trainer.args.world_size == 1
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if is_sharded:  # ranks would have to run the model together
            number, batch = trainer.step.first_bad() or (0, trainer.step.batches[0])
            how = "where it began is not looked for in a sharded model"
            found = Diagnosis(step, number, not batch.is_finite, batch.bad_parts(), how, batch=batch)
        else:
            assert trainer.model is not None
            model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            precision = trainer.compute_loss_context_manager
            found = look_at(
                trainer.step, step, is_loss and is_alone, model, trainer.loss, precision, is_alone=is_alone
            )
        if not is_alone:
            found.rank, found.is_loss = trainer.args.process_index, trainer.step.first_bad() is not None
        found.token = token_at(trainer, found)
        return found

    def _save(self, trainer: "TaskTrainer", found: Diagnosis, names: list[str]) -> str:
        """Save the batch; returns where it is, or why it is nowhere."""
        rank, num_ranks = trainer.args.process_index, trainer.args.world_size
        own = self.out_dir / name_of(found.step, rank, num_ranks)
        before = [path for at, path in checkpoints(self.out_dir) if at < found.step]
        try:
            if self.folder is not None:
                self.folder.claim(*names)
            if own.name in names:
                write_batch(
                    own,
                    found,
                    trainer.config,
                    state=trainer.loss.state_dict(),
                    checkpoint=before[-1] if before else None,
                    rank=rank,
                    num_ranks=num_ranks,
                )
        except Exception as error:  # the run has failed already, and says so
            return f"The batch could not be saved ({shortened(str(error))})"
        return f"The batch is saved: lossmith replay {self.out_dir / names[0]}"


def token_at(trainer: "TaskTrainer", found: Diagnosis) -> str:
    """The token to be predicted at the first place, if the task predicts tokens."""
    task, place = trainer.task, found.place
    if place is None or place.position is None or found.batch is None:
        return ""
    if not isinstance(task, TokenTask) or task.num_classes is not None:
        return ""
    row = found.batch.inputs["labels"][place.sample]
    at = place.position + int(task.shift)
    if not 0 <= at < len(row) or int(row[at]) < 0:
        return ""
    return str(task.tokenizer.decode([int(row[at])]))

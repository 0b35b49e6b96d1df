"""Where a run begins: at the start, or at its newest sound checkpoint; and its folder made ready."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.saved_run import save_config
from lossmith.training.errors import UserError
from lossmith.training.run.checkpoints import KEPT, best_so_far, newest_sound, require_sound_checkpoint
from lossmith.training.run.folder import RunFolder, SetAside, has_ended, names_of
from lossmith.training.run.terminal import say


@dataclass(frozen=True)
class Begin:
    """Where a run begins: after which step, from which checkpoint, past which damaged ones."""

    step: int = 0
    checkpoint: Path | None = None
    warnings: Sequence[str] = ()
    damaged: Sequence[str] = ()


def where_to_begin(config: TrainConfig, folder: RunFolder | None, num_ranks: int) -> Begin:
    """Where a run begins.

    Raises:
        UserError: nothing to resume, nothing left to train, or foreign files in the way.
    """
    if not config.resume:
        if folder:
            folder.require_room(names_of(config), after_step=0)
        return Begin()
    out_dir = Path(config.out_dir)
    found = newest_sound(out_dir, to_train=True)
    # A run that was killed after its last checkpoint still has to be evaluated.
    if found.step > config.max_iters or (found.step == config.max_iters and has_ended(out_dir, found.step)):
        raise UserError(
            f"nothing left to train: the checkpoint is at step {found.step}, max_iters={config.max_iters}. "
            f"Pass --max_iters={found.step * 2} to go on, or --eval_only to evaluate it."
        )
    if folder and not folder.has_list:
        folder.recognise()
    if folder:
        folder.require_room(names_of(config), after_step=found.step)
    require_sound_checkpoint(found.path, config)
    warnings = found.said
    if found.manifest.num_ranks != num_ranks:
        warnings.append(
            f"{found.path} was written by {found.manifest.num_ranks} processes and this run has {num_ranks}, "
            "so it draws other random numbers and does not end as it would have ended."
        )
    return Begin(found.step, found.path, warnings, [path.name for path, _ in found.damaged])


def prepare_folder(folder: RunFolder, config: TrainConfig, begin: Begin, console: Console) -> SetAside | None:
    """Move an earlier run aside, or tidy up after the one that is resumed; write this run's configuration."""
    aside = None if config.resume else folder.set_aside()
    if aside:
        say(console, f"The earlier run in {config.out_dir} is now in {aside.folder}.\n")
    folder.clear_half_written()
    folder.claim(*names_of(config))
    save_config(config)
    if begin.checkpoint:
        folder.passed_over |= {*begin.damaged}
        folder.keep_checkpoints(begin.checkpoint.name, KEPT, best_so_far(begin.checkpoint))
    return aside

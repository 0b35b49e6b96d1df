"""The command line: `lossmith train`, which is also `python train.py`, and the commands for what it leaves.

`main` checks that the extra's packages are installed before it imports them.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

NEEDED = ("rich", "yaml", "tokenizers", "safetensors", "transformers", "accelerate")
TO_READ_RUNS = ("rich", "yaml", "typer", "plotly")
# What each command needs: its extras and their packages.
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "demo": ("train,report", (*NEEDED, *TO_READ_RUNS)),
    "report": ("report", TO_READ_RUNS),
    "compare": ("report", TO_READ_RUNS),
    "watch": ("report", TO_READ_RUNS),
    "analyze": ("train,report", (*NEEDED, *TO_READ_RUNS)),
    "sample": ("train,report", (*NEEDED, *TO_READ_RUNS)),
    "replay": ("train,report", (*NEEDED, *TO_READ_RUNS)),
    "losses": ("train,report", (*NEEDED, *TO_READ_RUNS)),
}
HELP = ("--help", "-h")
USAGE = """Usage: lossmith train [config.py] [--key=value ...]
       lossmith COMMAND ...

Training objectives of language models. `lossmith train --help` lists the keys.

  train     train a model on a text
  demo      the same, and then a page about it
  report    a page about one or several runs: lossmith report RUN [RUN ...] -o report.html
  compare   what several runs came to and how their configurations differ
  watch     a run while it trains
  analyze   losses token by token, calibration, repetition: lossmith analyze RUN --text=FILE
  sample    text of a trained model: lossmith sample RUN --prompt="Once upon"
  replay    a batch that was not finite, part by part: lossmith replay RUN/nonfinite-5.safetensors
  losses    every loss, component and modifier, and the options of one: lossmith losses [NAME]

A RUN is a run's folder or one of its checkpoints."""


def main(args: list[str] | None = None) -> None:
    """The console entry point; `args` default to the command line's."""
    # OpenMP's threads spin while they wait, which on a busy machine makes a step several times as long.
    # OpenMP reads this once, when PyTorch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = sys.argv[1:] if args is None else args
    extras, packages = EXTRAS.get(args[0] if args else "", ("train", NEEDED))
    missing = dict.fromkeys(name for name in packages if importlib.util.find_spec(name) is None)
    if missing:
        needs = f"lossmith {args[0]}" if args and args[0] in EXTRAS else "the trainer"
        remedy = f"pip install 'lossmith[{extras}]'"
        print(f"error: {needs} needs {', '.join(missing)}; {remedy}", file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(command(args))


def command(args: list[str]) -> int:
    """Run a command and return the exit code."""
    from rich.console import Console

    from lossmith.training.errors import UserError
    from lossmith.training.run.terminal import say, say_error

    for stream in (sys.stdout, sys.stderr):  # a sample may contain what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Under torchrun only the first rank prints.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    errors = Console(stderr=True, quiet=console.quiet)
    try:
        if args[:1] in (["train"], ["demo"]):
            return train_command(args[1:], console, report=args[0] == "demo")
        if not args or args[0] in HELP:
            say(console, USAGE)
            return 0 if args else 2
        if args[0] in EXTRAS:
            from lossmith.training.commands.app import run_command

            return run_command(args, console)
        raise UserError(
            f"there is no command {args[0]!r}; expected train, {', '.join(EXTRAS)}. Write lossmith --help, "
            "or lossmith train --help."
        )
    except UserError as error:
        say_error(errors, str(error))
        return 2
    except KeyboardInterrupt:
        say(errors, "Stopped; what was not saved by a checkpoint is lost.", "yellow")
        return 130
    except BrokenPipeError:  # `lossmith train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def train_command(args: list[str], console: Console, *, report: bool = False) -> int:
    """Run `lossmith train`, with a report at its end if asked for, and return the exit code."""
    with console.status("Loading the libraries ..."):  # PyTorch too, which the losses' keys need
        from lossmith.training.config.reading import load_config
    if any(word in HELP for word in args):
        show_help(console)
        return 0
    config = load_config(args)
    with console.status("Loading the libraries ..."):
        from lossmith.training.run.runner import run
    code = run(config, console, command=how_started())
    if report and not code and not console.quiet:
        from lossmith.training.commands.app import run_command

        return run_command(["report", config.out_dir, "-o", f"{config.out_dir}/report.html"], console)
    return code


def how_started() -> str:
    """The command that the user typed, without the flags."""
    script = Path(sys.argv[0])
    return (
        f"python {sys.argv[0]}"
        if script.suffix == ".py" and script.name != "__main__.py"
        else "lossmith train"
    )


def show_help(console: Console) -> None:
    """Print every key with its default and meaning."""
    from rich.table import Table
    from rich.text import Text

    from lossmith.training.config.keys import default_of, describe, sections
    from lossmith.training.run.terminal import say

    say(console, "Usage: python train.py [config.py] [--key=value ...]     (or: lossmith train ...)\n")
    say(console, "A config file holds plain assignments, key = value. Flags come after it and win.\n")
    for title, keys in sections():
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(style="cyan", no_wrap=True, min_width=30)
        table.add_column(style="green", no_wrap=True, min_width=10)
        table.add_column(overflow="fold")
        for spec in keys:
            table.add_row(f"--{spec.name}", Text(default_of(spec)), Text(describe(spec)))
        say(console, table)
        say(console)

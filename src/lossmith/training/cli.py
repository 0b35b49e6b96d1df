"""The command line: `lossmith train`, which is also `python train.py`.

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
REMEDY = "pip install 'lossmith[train]'"
HELP = ("--help", "-h")
USAGE = """Usage: lossmith train [config.py] [--key=value ...]

Training objectives of language models. `lossmith train --help` lists the keys."""


def main(args: list[str] | None = None) -> None:
    """The console entry point; `args` default to the command line's."""
    # OpenMP's threads spin while they wait, which on a busy machine makes a step several times as long.
    # OpenMP reads this once, when PyTorch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: the trainer needs {', '.join(missing)}; {REMEDY}", file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(command(sys.argv[1:] if args is None else args))


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
        if args[:1] == ["train"]:
            return train_command(args[1:], console)
        if not args or args[0] in HELP:
            say(console, USAGE)
            return 0 if args else 2
        raise UserError(f"there is no command {args[0]!r}; expected `train`. Write lossmith train --help.")
    except UserError as error:
        say_error(errors, str(error))
        return 2
    except KeyboardInterrupt:
        say(errors, "Stopped; what was not saved by a checkpoint is lost.", "yellow")
        return 130
    except BrokenPipeError:  # `lossmith train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def train_command(args: list[str], console: Console) -> int:
    """Run `lossmith train` and return the exit code."""
    with console.status("Loading the libraries ..."):  # PyTorch too, which the losses' keys need
        from lossmith.training.config.reading import load_config
    if any(word in HELP for word in args):
        show_help(console)
        return 0
    config = load_config(args)
    with console.status("Loading the libraries ..."):
        from lossmith.training.run.runner import run
    return run(config, console, command=how_started())


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

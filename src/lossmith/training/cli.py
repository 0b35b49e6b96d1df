"""The command line: `lossmith train`, which `python train.py` calls too.

Nothing outside the standard library is imported before `main` has seen that it is installed.
"""

import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import Any

NEEDED = ("typer", "rich", "omegaconf", "tokenizers", "safetensors", "transformers", "accelerate")
REMEDY = "pip install 'lossmith[train]'"


def main(args: list[str] | None = None) -> None:
    """The console entry point.

    Args:
        args: what follows `lossmith` on the command line; taken from it when absent.
    """
    # On a busy machine OpenMP's threads burn the cores while they wait for one another, and a step takes
    # several times as long. The library reads this once, when PyTorch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: the trainer needs {', '.join(missing)}; {REMEDY}", file=sys.stderr)
        raise SystemExit(2)
    build_app()(args=args, prog_name="lossmith")


def build_app() -> Any:
    """The Typer application, one command a verb."""
    import typer

    app = typer.Typer(
        help="Training objectives of language models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def lossmith() -> None:
        """Training objectives of language models."""

    # Keys are checked by the configuration, which knows the nearest name; Typer only passes them on.
    @app.command(
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "help_option_names": [],
        }
    )
    def train(context: typer.Context) -> None:
        r"""Train a model: lossmith train \[config.py] \[--key=value ...]; --help lists the keys."""
        raise typer.Exit(train_command(list(context.args)))

    return app


def train_command(args: list[str]) -> int:
    """Run `lossmith train` with these arguments and return the exit code."""
    from rich.console import Console

    from lossmith.training.errors import UserError

    for stream in (sys.stdout, sys.stderr):  # a sample may hold what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Under torchrun every rank runs this; one of them speaks.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    errors = Console(stderr=True, quiet=console.quiet)
    try:
        with console.status("Loading the libraries ..."):  # PyTorch too: it comes with the modifiers' keys
            from lossmith.training.config import load_config
        if "--help" in args or "-h" in args:
            show_help(console)
            return 0
        config = load_config(args)
        with console.status("Loading the libraries ..."):
            from lossmith.training.runner import run
        return run(config, console, command=how_started())
    except UserError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("Stopped; what was not saved by a checkpoint is lost.", style="yellow")
        return 130


def escape(text: str) -> str:
    """Protect square brackets in a message from being read as markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def how_started() -> str:
    """The command as the user typed it, up to the keys."""
    script = Path(sys.argv[0])
    return (
        f"python {sys.argv[0]}"
        if script.suffix == ".py" and script.name != "__main__.py"
        else "lossmith train"
    )


def show_help(console: Any) -> None:
    """Every key with its default and meaning."""
    from rich.table import Table

    from lossmith.training.keys import default_of, describe, sections

    usage = "Usage: python train.py [config.py] [--key=value ...]     (or: lossmith train ...)\n"
    console.print(usage, markup=False, soft_wrap=True)
    console.print("A config file holds plain assignments, key = value. Flags come after it and win.\n")
    for title, keys in sections():
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(style="cyan", no_wrap=True, min_width=30)
        table.add_column(style="green", no_wrap=True, min_width=10)
        table.add_column(overflow="fold")
        for spec in keys:
            table.add_row(f"--{spec.name}", escape(default_of(spec)), escape(describe(spec)))
        console.print(table)
        console.print()

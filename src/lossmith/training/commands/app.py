"""The commands and their options, declared to Typer; each imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lossmith.training.errors import UserError

# Click's, of which newer versions of Typer have a copy.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs, or of checkpoints")]
OneRun = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run, or of a checkpoint")]
Best = Annotated[
    bool, typer.Option("--best", help="the checkpoint with the lowest validation loss, not the newest")
]


def run_command(args: list[str], console: Console) -> int:
    """Run a command and return the exit code; a UserError for a mistake of the user's."""
    from lossmith.report.reading import NoRun

    try:
        code = typer.main.get_command(app).main(
            args, prog_name="lossmith", standalone_mode=False, obj=console
        )
    except UsageError as error:
        said = error.format_message().rstrip(".")
        raise UserError(f"{said}. Write lossmith {args[0]} --help.") from None
    except NoRun as error:
        raise UserError(str(error)) from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    return code if isinstance(code, int) else 0


@app.command()
def report(
    ctx: typer.Context,
    runs: Runs,
    output: Annotated[Path, typer.Option("--output", "-o", help="the page to write")] = Path("report.html"),
) -> None:
    """Write a page about one or several runs: one file, which fetches nothing."""
    from lossmith.report import read_runs, write_page
    from lossmith.training.run.terminal import say

    try:
        notes = write_page(read_runs(runs), output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}. Pass another --output.") from None
    for note in notes:
        say(ctx.obj, note)
    say(ctx.obj, f"The page is {output} ({output.stat().st_size / 1e6:.1f} MB): {output.absolute().as_uri()}")


@app.command()
def compare(ctx: typer.Context, runs: Runs) -> None:
    """Show what several runs came to and how their configurations differ."""
    from lossmith.training.commands.tables import show_comparison

    show_comparison(ctx.obj, runs)


@app.command()
def watch(
    ctx: typer.Context,
    run: OneRun,
    once: Annotated[bool, typer.Option("--once", help="show what is there and stop")] = False,
    seconds: Annotated[float, typer.Option(help="between looks at the log", min=0.1)] = 2.0,
) -> None:
    """Show a run while it trains, until it ends or you press Ctrl-C; it need not be on this terminal."""
    from lossmith.training.commands.watch import watch_run

    watch_run(ctx.obj, run, seconds=0.0 if once else seconds)


@app.command()
def analyze(
    ctx: typer.Context,
    run: OneRun,
    text: Annotated[Path | None, typer.Option(help="a text file in place of the held-out text")] = None,
    best: Best = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="also write the numbers as JSON here")
    ] = None,
) -> None:
    """Show what a model knows of a text: hard tokens, losses by position and frequency, calibration."""
    from lossmith.training.commands.saved_model import analyze_text

    analyze_text(ctx.obj, run, text=text, best=best, output=output)


@app.command()
def sample(
    ctx: typer.Context,
    run: OneRun,
    prompt: Annotated[
        str, typer.Option(help="text to go on from; without one, the beginning of a text")
    ] = "",
    tokens: Annotated[int, typer.Option(help="how many to write at most", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token", min=0.0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="how many tokens are drawn from", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="of what is drawn", min=0)] = 1337,
    best: Best = False,
) -> None:
    """Show text that a trained model writes, or, if it is not causal, what it does with a held-out text."""
    from lossmith.training.commands.saved_model import write_sample

    drawn = {"length": tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    write_sample(ctx.obj, run, prompt=prompt, best=best, drawn=drawn)


@app.command()
def replay(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="a nonfinite-N.safetensors, or a run's folder")
    ],
    loss: Annotated[str, typer.Option(help="module:function, if the run had a loss of its own")] = "",
) -> None:
    """Compute a batch again whose loss or gradient was not finite, part by part."""
    from lossmith.training.commands.replay import replay_batch

    replay_batch(ctx.obj, file, loss)


@app.command()
def losses(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="one of them, with its options")
    ] = None,
) -> None:
    """List every loss, component and modifier, or the options of one."""
    from lossmith.training.commands.tables import show_losses

    show_losses(ctx.obj, name)

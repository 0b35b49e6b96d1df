"""Writes experiments/README.md from the docstrings of the experiments and from results/*.csv.

    python experiments/readme.py

A docstring has paragraphs: the question; `Task:`; `Measured`; `Tried:` (how many settings were tried, if
any beyond the table's); `Shows:`. In the last two `{arm: metric}` is replaced by the mean over the seeds.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from statistics import fmean

from harness import RESULTS, Row, read, shown, table, values

HERE = Path(__file__).parent
ORDER = (
    "loops",
    "repetition",
    "early_eos",
    "all_modifiers",
    "mask_ratio",
    "entropy",
    "judge",
    "scorer",
    "smoothing",
    "focal",
    "z_loss",
    "nvamp",
    "temperature",
    "mtp",
    "moe",
    "contrastive",
)
TITLES = {
    "loops": "Repetition penalties: greedy loops",
    "repetition": "Repetition penalties: real text",
    "early_eos": "Early end of sequence",
    "all_modifiers": "All loss modifiers together",
    "mask_ratio": "Mask-ratio weight",
    "entropy": "Entropy weight",
    "judge": "Judge",
    "scorer": "Variance and correlation of a sequence scorer",
    "smoothing": "Label smoothing and confidence penalty",
    "focal": "Focal loss",
    "z_loss": "z-loss",
    "nvamp": "NVAMP",
    "temperature": "Temperature",
    "mtp": "Multi-token prediction",
    "moe": "Balance of experts",
    "contrastive": "Contrastive loss of tokens",
}
HEAD = """# Experiments

One script a component: does it do what it says, on a task where that would show? Models and languages are
small and artificial, so the numbers say whether and in which direction a component acts, not how much it is
worth in a large model. A component that shows no benefit is reported so.

All arms of a seed have the same start and see the same data. Tables give the mean over three seeds, with
the lowest and the highest. Scripts take `--seeds N` and write `experiments/results/NAME.csv`; `python
experiments/readme.py` writes this page from those files and the scripts' docstrings.
"""


def page() -> str:
    """The text of README.md."""
    known = [name for name in ORDER if (RESULTS / f"{name}.csv").exists()]
    return "\n".join([HEAD, *(section(name) for name in known)])


def section(name: str) -> str:
    rows = read(RESULTS / f"{name}.csv")
    docstring = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    question, *rest = [filled(part, rows) for part in docstring.split("\n\n")]
    before = [part for part in rest if not part.startswith(("Shows:", "Tried:"))]
    after = [re.sub(r"^(Shows|Tried):", r"**\1:**", part) for part in rest if part not in before]
    command = f"```\npython experiments/{name}.py\n```"
    return "\n\n".join([f"## {TITLES[name]}", question, *before, table(rows), *after, command]) + "\n"


def filled(text: str, rows: list[Row]) -> str:
    """The paragraph with every `{arm: metric}` replaced by the mean over the seeds."""

    def mean(found: re.Match[str]) -> str:
        arm, metric = re.sub(r"\s+", " ", found[1]), re.sub(r"\s+", " ", found[2])
        return shown(fmean(values(rows, arm, metric)))

    whole = " ".join(re.sub(r"\{([^{}:]+):\s+([^{}]+)\}", mean, text).split())
    return textwrap.fill(whole, 108, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())

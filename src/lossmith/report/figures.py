"""The figures of a report, one function each: plain dictionaries as plotly.js takes them.

A trace's ``meta`` says which run and which part it is of, by which the page shows and hides it, and ``x``
whether it goes along the training steps or the evaluations; the page fills these in, so that they are written
once for all traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from lossmith.report.comparison import gaps
from lossmith.report.reading import COSINES, MODIFIERS, PARTS, PULLS, Run

Trace = dict[str, Any]
Figure = dict[str, Any]
# Okabe and Ito's colours, which the colour-blind can tell apart and which stand out on white and on black.
COLOURS = ("#0b84c6", "#e0862a", "#17a07a", "#d0597e", "#8a77d9", "#b59a00", "#56a5e0", "#c4562b")
STEPS, EVALUATIONS = "steps", "evaluations"
# What modifiers call the spread of the weights that they give to samples.
WEIGHTS = {
    "mean": ("weight_mean", "mean_weight"),
    "lowest": ("weight_min", "min_weight"),
    "highest": ("weight_max", "max_weight"),
}


def colour(index: int) -> str:
    """The colour of a run or a part."""
    return COLOURS[index % len(COLOURS)]


def drawn(title: str, note: str, traces: list[Trace], y: str, x: str = "step", **layout: Any) -> list[Figure]:
    """A figure of these traces; none if nothing is in them. Names are text, whatever is in them."""
    traces = [t for t in traces if any(value is not None for value in t.get("y", t.get("z", ())))]
    if not traces:
        return []
    for trace in traces:
        trace["name"] = escape(trace["name"])
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return [{"title": title, "note": note, "data": traces, "layout": axes | layout}]


def line(
    run: int, name: str, y: list[Any], along: str = STEPS, *, of: int | None = None, **more: Any
) -> Trace:
    """A curve of a run, in the colour of the run or of the part ``of``."""
    meta = {"run": run, "x": along, "part": more.pop("part", None)}
    style = {"color": colour(run if of is None else of), "width": 1.5} | more.pop("line", {})
    return {"type": "scatter", "mode": "lines", "name": name, "y": y, "line": style, "meta": meta} | more


def column(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """A key's values, None where a row has none."""
    return [row.get(key) for row in rows]


def of_runs(runs: Sequence[Run], key: str, along: str = STEPS) -> list[Trace]:
    """A curve of a key for every run."""
    return [line(i, run.name, column(getattr(run, along), key), along) for i, run in enumerate(runs)]


# ── of all runs together ──────────────────────────────────────────────────────────────────────────


def in_training_and_validated(runs: Sequence[Run], key: str, key_of_evaluations: str) -> list[Trace]:
    """Faint curves of the training steps and bold ones of the evaluations."""
    faint = [trace | {"opacity": 0.45} for trace in of_runs(runs, key)]
    bold = of_runs(runs, key_of_evaluations, EVALUATIONS)
    for trace in bold:
        trace |= {"name": f"{trace['name']}, validation", "mode": "lines+markers"}
        trace["line"]["width"] = 2.5
    return faint + bold


def losses(runs: Sequence[Run]) -> list[Figure]:
    traces = in_training_and_validated(runs, "loss", "val_loss")
    note = "Faint: the objective in training, with its options. Bold: the plain loss of held-out text."
    return drawn("Loss", note, traces, "nats per token")


def perplexities(runs: Sequence[Run]) -> list[Figure]:
    traces = in_training_and_validated(runs, "perplexity", "perplexity")
    note = "exp of the plain loss, in training (faint) and on held-out text; a logarithmic axis."
    axis = {"title": {"text": "perplexity"}, "type": "log", "dtick": "D2"}
    return drawn("Perplexity", note, traces, "", yaxis=axis)


def gap(runs: Sequence[Run]) -> list[Figure]:
    traces = []
    for i, run in enumerate(runs):
        y = [value for _, value in gaps(run)]
        traces.append(line(i, run.name, y, EVALUATIONS, mode="lines+markers"))
    note = (
        "The validation loss less the plain training loss since the evaluation before. Above 0 and growing: "
        "the model learns its training text by heart."
    )
    return drawn("Train and validation", note, traces, "nats per token")


def learning_rates(runs: Sequence[Run]) -> list[Figure]:
    return drawn("Learning rate", "", of_runs(runs, "learning_rate"), "learning rate")


def throughput(runs: Sequence[Run]) -> list[Figure]:
    axis = {"title": {"text": "tokens per second"}, "rangemode": "tozero"}
    note = "Without evaluations and checkpoints."
    return drawn("Throughput", note, of_runs(runs, "tokens_per_second"), "", yaxis=axis)


def gradients(runs: Sequence[Run]) -> list[Figure]:
    return drawn("Norm of the gradient", "Before clipping.", of_runs(runs, "grad_norm"), "norm")


# ── of each run ───────────────────────────────────────────────────────────────────────────────────


def parts(index: int, run: Run, known: Sequence[str]) -> list[Figure]:
    """Stacked areas, those of negative parts below zero."""
    of = {name: column(run.steps, PARTS + name) for name in run.parts} or {"loss": column(run.steps, "loss")}
    traces = []
    for name, y in of.items():
        numbers = [value for value in y if value is not None]
        stack = "below" if sum(numbers) < 0 else "above"
        place = known.index(name) if name in known else 0
        style: dict[str, Any] = {"line": {"width": 0.5}, "stackgroup": stack, "part": name}
        traces.append(line(index, name, y, of=place, **style))
    style = {"line": {"width": 1.2, "dash": "dot", "color": "#888"}}
    traces.append(line(index, "sum: the loss", column(run.steps, "loss"), **style))
    traces[-1]["meta"]["of_all_parts"] = True
    note = "What each part adds to the loss, with its weight: the areas sum to the dotted line."
    if len(of) > 1:
        note += " Untick the largest at the top of the page to see the others."
    return drawn("Parts of the loss", note, traces, "weighted contribution")


def pulls(index: int, run: Run, known: Sequence[str]) -> list[Figure]:
    """How hard each part pulls, and where to; measured in some of the logged steps."""
    note = "The norm of each part's gradient in the model's last hidden states, or else its logits."
    hard = drawn("Pull", note, pulled(index, run, known, PULLS), "norm of the gradient")
    note = (
        "The cosine of each part's gradient and that of the whole loss: 1 pulls where the loss goes, 0 "
        "elsewhere, below 0 against it."
    )
    axis = {"title": {"text": "cosine"}, "range": [-1.05, 1.05]}
    return hard + drawn("Direction of the pull", note, pulled(index, run, known, COSINES), "", yaxis=axis)


def pulled(index: int, run: Run, known: Sequence[str], prefix: str) -> list[Trace]:
    """A curve for each part, over the steps that were measured."""
    names = [key.removeprefix(prefix) for key in run.logged if key.startswith(prefix)]
    found = {name: column(run.steps, prefix + name) for name in names}
    few = {"mode": "lines+markers", "connectgaps": True}
    return [
        line(index, name, y, of=known.index(name) if name in known else k, part=name)
        | (few if None in y else {})
        for k, (name, y) in enumerate(found.items())
    ]


def modifier_weights(index: int, run: Run) -> list[Figure]:
    """A band from the lowest to the highest weight of a sample, and the mean."""
    keys = [key.removeprefix(MODIFIERS) for key in run.logged if key.startswith(MODIFIERS)]
    traces = []
    for k, name in enumerate(dict.fromkeys(key.rpartition(".")[0] for key in keys)):
        found = {
            what: next((f"{name}.{key}" for key in names if f"{name}.{key}" in keys), None)
            for what, names in WEIGHTS.items()
        }
        if None in found.values():
            continue
        lowest, highest, mean = (
            column(run.steps, f"{MODIFIERS}{found[w]}") for w in ("lowest", "highest", "mean")
        )
        thin: dict[str, Any] = {"line": {"width": 0.5}, "of": k}
        traces.append(line(index, f"{name}, lowest", lowest, showlegend=False, **thin))
        traces.append(line(index, f"{name}, highest", highest, fill="tonexty", showlegend=False, **thin))
        traces.append(line(index, name, mean, of=k))
    note = "Of the samples of a batch: the lowest, the mean and the highest weight."
    return drawn("Weights by modifiers", note, traces, "weight of a sample")


def measured(index: int, run: Run) -> list[Figure]:
    """What the parts of the objective measure, such as how far experts are from balance."""
    known = (PARTS, PULLS, COSINES, MODIFIERS)
    names = [key for key in run.logged if "/" in key and not key.startswith(known)]
    traces = [line(index, name, column(run.steps, name), of=k) for k, name in enumerate(names)]
    return drawn("Measured by parts", "Of the last batch before each line of the log.", traces, "")


def expert_usage(index: int, run: Run) -> list[Figure]:
    usage = run.analysis.get("expert_usage")
    if not usage:
        return []
    z = [[round(share, 4) for share in layer] for layer in usage]
    heat: Trace = {
        "type": "heatmap",
        "name": run.name,
        "z": z,
        "y": [f"layer {k}" for k in range(len(z))],
        "x": [f"expert {k}" for k in range(max(map(len, z)))],
        "zmin": 0,
        "zmax": 2 / max(map(len, z)),
        "colorscale": [[0, "#5a6572"], [1, "#0b84c6"]],  # white is legible on either
        "texttemplate": "%{z:.0%}",
        "textfont": {"color": "#fff"},
        "showscale": False,
        "meta": {"run": index, "x": None, "part": None},
    }
    even = f"{1 / max(map(len, z)):.0%}"
    note = f"The share of the held-out tokens' choices that each expert got; {even} each would be even."
    return drawn("Experts", note, [heat], "", x="", yaxis={"autorange": "reversed"})


# ── of a run's analysis ───────────────────────────────────────────────────────────────────────────


def banded(runs: Sequence[Run], key: str) -> list[Trace]:
    """Mean losses by band, a curve a run."""
    return [
        line(i, run.name, _rounded(found["loss"]), mode="lines+markers")
        | {"x": found["labels"], "meta": {"run": i, "x": None, "part": None}}
        | {"customdata": found["num_tokens"], "hovertemplate": "%{y:.3f} (%{customdata:,} tokens)"}
        for i, run in enumerate(runs)
        if (found := run.analysis.get(key))
    ]


def by_position(runs: Sequence[Run]) -> list[Figure]:
    traces = banded(runs, "by_position")
    for trace in traces:  # each band stands at its first position
        trace["x"] = [label.partition("-")[0] for label in trace["x"]]
    note = "The plain loss at each position of a block: how much the text before helps."
    axis = {"title": {"text": "position"}, "type": "linear"}
    return drawn("Loss by position", note, traces, "nats per token", xaxis=axis)


def by_frequency(runs: Sequence[Run]) -> list[Figure]:
    note = "The plain loss of tokens by how often they occur in the training text."
    order = ["0", *(f"{10**k}-{10 ** (k + 1) - 1}" for k in range(19))]
    axis = {"title": {"text": "occurrences"}, "type": "category"}
    axis |= {"categoryorder": "array", "categoryarray": order}
    return drawn("Loss by frequency", note, banded(runs, "by_frequency"), "nats per token", xaxis=axis)


def calibration(runs: Sequence[Run]) -> list[Figure]:
    traces = []
    for i, run in enumerate(runs):
        found = run.analysis.get("calibration")
        if not found:
            continue
        of = line(i, f"{run.name}: ECE {found['ece']:.3f}", _rounded(found["accuracy"]), mode="lines+markers")
        x = {"x": _rounded(found["confidence"]), "meta": {"run": i, "x": None, "part": None}}
        hover = {"customdata": found["num_tokens"]}
        hover["hovertemplate"] = "right %{y:.1%} at %{x:.1%} (%{customdata:,} tokens)"
        traces.append(of | x | hover)
    if traces:
        style = {"color": "#888", "width": 1, "dash": "dot"}
        ideal = {"type": "scatter", "mode": "lines", "name": "ideal", "line": style, "hoverinfo": "skip"}
        traces.append(ideal | {"x": [0, 1], "y": [0, 1], "meta": {"run": None, "x": None, "part": None}})
    note = "How often the most probable token is right, by its probability. Below the line: too sure."
    axes: dict[str, Any] = {"xaxis": {"title": {"text": "confidence"}, "range": [0, 1], "tickformat": ".0%"}}
    axes["yaxis"] = {"title": {"text": "accuracy"}, "range": [0, 1], "tickformat": ".0%"}
    return drawn("Calibration", note, traces, "", hovermode="closest", **axes)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


OF_ALL = (losses, perplexities, gap, learning_rates, throughput, gradients)
OF_ALL_ANALYSED = (by_position, by_frequency, calibration)

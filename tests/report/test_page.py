"""The page without a browser: what it draws, that it fetches nothing, that text stays text, its size."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs_case import HOSTILE, PARTS, analysis_of, write_run

pytest.importorskip("plotly")
pytest.importorskip("yaml")

from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from lossmith.report import read_runs, write_page
from lossmith.report.figures import parts
from lossmith.report.reading import read_run

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def page_of(folder: Path, *paths: Path) -> str:
    """The page about runs."""
    page = folder / "report.html"
    write_page(read_runs(paths), page)
    return page.read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    """What the page draws."""
    found = DATA.search(page)
    assert found
    return json.loads(found[1])


def test_every_figure_is_one_that_plotly_takes(tmp_path: Path):
    page = page_of(tmp_path, *(write_run(tmp_path / name) for name in "ab"))
    figures = data_of(page)["figures"]
    for figure in figures:
        Figure(data=figure["data"], layout=figure["layout"])  # refuses what it does not know
    for title in (
        "Loss", "Perplexity", "Train and validation", "Learning rate", "Throughput", "Norm of the gradient",
        "Parts of the loss", "Pull", "Weights by modifiers", "Measured by parts", "Experts",
        "Loss by position", "Loss by frequency", "Calibration", "Hardest tokens", "Sample",
    ):  # fmt: skip
        assert f"<h3>{title}" in page, title
    assert page.count('class="plot"') == len(figures)
    assert [f'data-figure="{k}"' in page for k in range(len(figures))] == [True] * len(figures)


def test_the_parts_sum_to_the_loss(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run", num_steps=5000)).thinned(300)
    (figure,) = parts(0, run, run.parts)
    *stacked, total = figure["data"]
    assert [trace["meta"]["part"] for trace in stacked] == list(PARTS)
    assert {trace["name"]: trace["stackgroup"] for trace in stacked}["confidence_penalty"] == "below"
    for k, loss in enumerate(total["y"]):
        assert math.fsum(trace["y"][k] for trace in stacked) == pytest.approx(loss, rel=1e-3)


def test_a_run_without_parts_shows_its_loss(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (figure,) = parts(0, read_run(folder), [])
    assert [trace["y"] for trace in figure["data"]] == [[2.0, 1.0], [2.0, 1.0]]
    page = page_of(tmp_path, folder)
    assert "<h3>Pull" not in page
    assert "<nav" not in page  # nothing to choose


def test_an_empty_run_has_a_page(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")
    assert "Training of run" in page_of(tmp_path, tmp_path / "run")


def test_nothing_is_fetched(tmp_path: Path):
    page = page_of(tmp_path, write_run(tmp_path / "run"))
    assert """content="default-src 'none'; script-src 'unsafe-inline';""" in page
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < 200_000
    for word in ("http:", "https:", "//", "src=", "href=", "url(", "@import", "fetch(", "XMLHttp", "import("):
        lines = [line for line in own.splitlines() if word in line and not line.lstrip().startswith("//")]
        assert not lines, word


def test_text_of_a_run_stays_text(tmp_path: Path):
    folder = write_run(
        tmp_path / f"run {HOSTILE.replace('/', '')}",
        parts=("cross_entropy", HOSTILE),
        config={HOSTILE: HOSTILE},
        analysis=analysis_of(HOSTILE),
        findings=(HOSTILE,),
    )
    other = write_run(
        tmp_path / "other", config={HOSTILE: "x"}, analysis=analysis_of("</pre></mark>{{plotly}}")
    )
    page = page_of(tmp_path, folder, other)
    assert "<script>document" not in page
    assert page.count("</script>") == 3  # plotly's, the data's, the page's
    assert "&lt;script&gt;document.title=" in page
    assert "&lt;/pre&gt;&lt;/mark&gt;{{plotly}}" in page
    assert data_of(page)["figures"]


def test_three_runs_of_ten_thousand_steps_take_at_most_6_mb(tmp_path: Path):
    wide = (*PARTS, "mtp_loss", "moe_balance_loss", "router_z_loss", "focal")
    paths = [write_run(tmp_path / name, 10_000, seed=k, parts=wide) for k, name in enumerate("abc")]
    page = tmp_path / "report.html"
    notes = write_page(read_runs(paths), page)
    assert page.stat().st_size <= 6_000_000
    assert notes[0].startswith("a: 10,000 logged steps are drawn as ")
    assert notes[0] in page.read_text()


def test_the_report_needs_no_torch():
    code = "import sys; import lossmith.report; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"

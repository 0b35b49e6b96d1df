"""The page in a browser: it draws, filters, compares, requests nothing, and runs nothing of a token."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from runs_case import HOSTILE, PARTS, analysis_of, write_run

pytest.importorskip("plotly")
pytest.importorskip("yaml")
pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import sync_playwright

from lossmith.report import read_runs, write_page

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
PATH = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(PATH is None, reason=f"no browser here: none of {', '.join(BROWSERS)}")
SECONDS = 3.0
VISIBLE = "k => plots[k].data.filter(t => t.visible !== false).map(t => t.name)"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as run:
        browser = run.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs, one of which is hostile."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(
            folder / "first", config={"z_loss": 0.1}, analysis=analysis_of(HOSTILE), findings=(HOSTILE,)
        ),
        write_run(folder / "second", config={"z_loss": 0.2, "note": HOSTILE}, seed=1),
    ]
    write_page(read_runs(runs), folder / "report.html")
    return folder / "report.html"


class Opened:
    """A page, and what it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, width: int = 1400, scheme: str = "light"):
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        session = self.page.context.new_cdp_session(self.page)
        session.send("Performance.enable")
        self.page.goto(path.as_uri())
        self.page.locator(".plot").first.scroll_into_view_if_needed()
        self.page.wait_for_selector(".plot .main-svg")
        measured = session.send("Performance.getMetrics")["metrics"]
        # Of the processor, not of the clock: tests share their machine.
        self.seconds = next(each["value"] for each in measured if each["name"] == "ThreadTime")

    def draw_all(self) -> None:
        self.page.evaluate("Promise.all(plots.map(draw))")

    def figure(self, title: str) -> int:
        """The number of the first figure with this title."""
        cards = self.page.locator(".plot").evaluate_all(
            "all => all.map(e => e.closest('section').querySelector('h3').textContent)"
        )
        return next(k for k, text in enumerate(cards) if text.startswith(title))

    def visible(self, title: str) -> list[str]:
        """The names of the curves that a figure shows."""
        return self.page.evaluate(VISIBLE, self.figure(title))


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1400, "light"),
        (420, "dark"),
        pytest.param(1400, "dark", marks=pytest.mark.slow),
        pytest.param(420, "light", marks=pytest.mark.slow),
    ],
)
def test_it_draws_and_requests_nothing(browser: Any, path: Path, width: int, scheme: str):
    opened = Opened(browser, path, width, scheme)
    opened.draw_all()
    drawn = opened.page.locator(".plot .main-svg").count()
    assert drawn >= opened.page.locator(".plot").count() > 15
    assert opened.requests == [path.as_uri()]
    assert opened.complaints == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    ink = opened.page.evaluate("getComputedStyle(document.body).color")
    assert ink == {"light": "rgb(29, 36, 48)", "dark": "rgb(228, 232, 238)"}[scheme]


def test_a_token_that_is_a_script_stays_text(browser: Any, path: Path):
    opened = Opened(browser, path)
    opened.draw_all()
    assert opened.page.title() == "Training of first, second"
    assert opened.page.locator("mark").first.text_content() == HOSTILE
    assert opened.page.locator("li").first.text_content() == HOSTILE
    assert opened.page.locator("script").count() == 3


def test_parts_and_runs_are_chosen(browser: Any, path: Path):
    opened = Opened(browser, path)
    opened.draw_all()
    assert opened.visible("Parts of the loss") == [*PARTS, "sum: the loss"]
    opened.page.uncheck("input[name=part][value=cross_entropy]")
    assert opened.visible("Parts of the loss") == list(PARTS[1:])
    assert opened.visible("Pull") == list(PARTS[1:])
    opened.page.check("input[name=part][value=cross_entropy]")
    assert opened.visible("Parts of the loss") == [*PARTS, "sum: the loss"]
    assert opened.visible("Learning rate") == ["first", "second"]
    opened.page.uncheck("input[name=run][value='0']")
    assert opened.visible("Learning rate") == ["second"]
    hidden = opened.page.locator("[data-run='0']").evaluate_all(
        "all => all.every(e => e.offsetParent === null)"
    )
    assert hidden


def test_runs_are_compared(browser: Any, path: Path):
    opened = Opened(browser, path)
    table = opened.page.locator("section", has_text="What differs between the configurations").locator(
        "table"
    )
    assert table.locator("tr", has_text="z_loss").inner_text().split() == ["z_loss", "0.1", "0.2"]


def test_a_large_page_opens_in_three_seconds(browser: Any, tmp_path: Path):
    runs = [write_run(tmp_path / name, 10_000, seed=k) for k, name in enumerate("abc")]
    write_page(read_runs(runs), tmp_path / "report.html")
    assert Opened(browser, tmp_path / "report.html").seconds < SECONDS

#!/usr/bin/env python3
"""Take the pictures of docs/first_run.md from a report: two parts of its page, in a headless Chromium.

python scripts/site/pictures.py out/report.html
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
SECTIONS = {"first-run-curves": "Over time", "first-run-tokens": "Tokens"}


def main(report: Path) -> None:
    browser_path = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as run:
        browser = run.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme="light")
        page.goto(report.absolute().as_uri())
        for name, title in SECTIONS.items():
            section = page.locator(f'h2:text-is("{title}") + div')
            section.scroll_into_view_if_needed()
            page.wait_for_timeout(1500)
            section.screenshot(path=IMAGES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Runs as one self-contained page: `reading` reads a run's folder, `figures` draws, `page` puts it together.

Nothing here loads PyTorch.
"""

from lossmith.report.page import write_page
from lossmith.report.reading import NoRun, Run, read_run, read_runs

__all__ = ["NoRun", "Run", "read_run", "read_runs", "write_page"]

"""Parameters of which a few stand for all in `make test`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(kept: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """All the values, those that are not kept for `make test` marked slow."""
    kept = list(kept)
    values = list(values)
    missing = [value for value in kept if value not in values]
    assert not missing, f"{missing} are not among {values}"
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]

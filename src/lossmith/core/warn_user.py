"""``warn_user``: a warning that points at the user's line, however deep in the library it is raised."""

from __future__ import annotations

import sys
import warnings

# Frames between the user's line and ours: the library, and PyTorch's module calls.
BETWEEN = {"lossmith", "torch"}


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn from the nearest line that is neither this library's nor PyTorch's.

    Python shows a DeprecationWarning only where it comes from the user's own script.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)

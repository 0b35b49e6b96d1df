"""Logits whose rows end formulas."""

import torch

INF = float("inf")


def nasty_logits(num_classes=7):
    """Rows that end formulas: certain either way, masked, equal, alone, broken."""
    torch.manual_seed(0)
    rows = torch.randn(24, num_classes, dtype=torch.float64) * 3
    rows[1, 2] = 800.0  # the target, certain
    rows[2, 0] = 800.0  # another, certain
    rows[3] = 0.0
    rows[4, 3:] = -INF
    rows[5, 2] = -INF  # a masked target
    rows[6] = -INF
    rows[6, 2] = 1.5  # nothing but the target
    rows[7, 0] = 36.0
    rows[8, 2] = 60.0
    rows[9] *= 1e-6
    rows[10, :2] = -INF
    rows[11, 5] = 1e4
    rows[12, 2] = 1e5
    return rows, torch.full((24,), 2)

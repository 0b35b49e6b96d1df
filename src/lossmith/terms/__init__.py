"""Per-token losses: statistics in, [N] values out, nothing reduced. Ten lines each."""

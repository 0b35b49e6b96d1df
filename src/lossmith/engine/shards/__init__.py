"""A vocabulary split across ranks: each sweeps its own classes, and the statistics are merged."""

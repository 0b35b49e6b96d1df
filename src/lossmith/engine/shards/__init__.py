"""Vocabularies and sequences split across ranks: each sweeps its own part, and each gets the
statistics of the whole."""

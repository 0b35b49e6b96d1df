"""Rows of logits to raw statistics and back, by one of several kinds of arithmetic."""

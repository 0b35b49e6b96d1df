"""Modifiers of the loss of a sequence scorer."""

"""The configuration of a run: its keys, where their values come from, and the rules that they obey."""

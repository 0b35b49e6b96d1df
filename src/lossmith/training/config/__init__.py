"""What a run is told: every key, where the values come from, and whether they go together."""

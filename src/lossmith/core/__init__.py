"""The foundations: ranks, metrics, optimizer steps, former names, warnings."""

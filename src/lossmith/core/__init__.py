"""What everything stands on: ranks, metrics, optimizer steps, former names, warnings."""

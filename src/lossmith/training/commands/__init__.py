"""The commands for what a run leaves: `report`, `compare`, `watch`, `analyze`, `sample`, `replay`,
and `losses`."""

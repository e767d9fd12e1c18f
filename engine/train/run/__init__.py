"""What a run writes: its folder and lock, checkpoints, metrics, the best model, config.json and the report."""

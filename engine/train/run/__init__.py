"""What a run writes: its folder, lock, checkpoints, metrics, results and report."""

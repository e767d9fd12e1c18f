"""The benchmark command: speed and memory of a training step beside its peers."""

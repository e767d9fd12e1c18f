"""Configuration, the loop, losses, optimizers, schedules, large batches and checkpoints."""

"""Training: settings, setup, the loop, losses, optimizers, and what a run writes.

Imports evaluate, report, clip and data; nodes, cli and bench import it.
"""

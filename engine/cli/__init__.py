"""The command line. `main` is the entry point of `clip-finetune`."""

from .main import main

__all__ = ["main"]

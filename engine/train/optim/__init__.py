"""Optimizers, parameter groups and gradient norms."""

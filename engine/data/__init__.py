"""Captions and labels, pictures, tokens and batches."""

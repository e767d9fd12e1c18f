"""From files to batches: datasets and their captions, images, tokens, and the loaders that put them together."""

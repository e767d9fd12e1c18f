"""Zero-shot classification, retrieval and typographic attack."""

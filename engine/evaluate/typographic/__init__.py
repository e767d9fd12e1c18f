"""Typographic attacks: words drawn on images, and photographs of written words."""

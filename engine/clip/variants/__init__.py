"""Architectures beside the plain ViT with 77 tokens: ResNet vision towers and Long-CLIP position tables."""

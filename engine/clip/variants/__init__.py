"""Architectures beside the plain ViT: ResNet vision towers and Long-CLIP position tables."""

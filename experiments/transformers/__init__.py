"""Transformers: a language model of bytes and a ViT, trained by ResIST beside local SGD, DiLoCo, DDP and one process."""

"""Families of networks: one file each, with initialisation, batched forward and quantization."""

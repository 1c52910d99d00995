"""Triton twins of the codecs, for CUDA: the only place that imports triton, so nothing imports it before a GPU is asked for."""

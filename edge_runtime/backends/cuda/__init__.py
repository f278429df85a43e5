"""Cascades on an NVIDIA GPU: the small CUDA interface, `decide`, and the execution modes."""

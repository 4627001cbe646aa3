"""Attention and cross-entropy: one function each, with an XLA reference and room for faster kernels per backend."""

"""Batched low-rank linear algebra on arrays: torch on CPU and CUDA, CuPy. Knows no file and no model."""

"""Triton kernels, one file per op. Importing this package imports neither Triton nor CUDA."""

"""Triton's kernels; imported when they were chosen, because the package triton is optional."""

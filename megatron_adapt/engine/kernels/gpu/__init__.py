"""Triton's kernels, a file each beside its torch twin in the folder above; imported only where they run."""

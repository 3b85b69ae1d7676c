"""Triton's kernels are interpreted, on a CPU; they read this when they are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

"""What the benchmarks share: rounds in turns, fresh processes, tables."""

import warnings

# Here because it must come before megatron-core is imported, which announces every optional package it misses.
warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")

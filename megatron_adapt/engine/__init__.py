"""megatron-core on any machine: parallel layout, model, and what learns."""

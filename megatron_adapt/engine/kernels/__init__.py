"""Parts of the model that are computed otherwise than megatron-core computes them."""

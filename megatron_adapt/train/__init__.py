"""The training run on megatron-core: one stage of a recipe."""

"""Hugging Face folders and Megatron torch_dist checkpoints, one tensor at a time."""

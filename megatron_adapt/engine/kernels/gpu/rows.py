"""Tensors of any shape and strides as the rows that a kernel goes through."""

import torch


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return [.., H] as [R, H] with neighbours in a row; a copy only where strides ask for one."""
    rows_RH = tensor.reshape(-1, tensor.shape[-1])
    return rows_RH if rows_RH.stride(-1) == 1 else rows_RH.contiguous()

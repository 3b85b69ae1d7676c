"""RMSNorm equals its formula and tells the engine when a rank sees a part of the sequence."""

from types import SimpleNamespace

import pytest
import torch

from megatron_adapt.engine.norm import RMSNorm


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_equals_the_formula(sequence_parallel):
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=sequence_parallel)
    norm = RMSNorm(config, 16, eps=1e-3, kernels="torch")
    norm.weight.data.uniform_(0.5, 1.5)
    hidden = torch.randn(5, 16)
    expected = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-3) * norm.weight
    assert torch.allclose(norm(hidden), expected, atol=1e-6)
    assert norm.weight.sequence_parallel is sequence_parallel

"""Core attention equals the formula, with fewer key-value heads than query heads."""

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_adapt.engine.attention import SDPACoreAttention

T, B, N, D = 9, 2, 6, 8


def attend_by_formula(query, key, value, hidden_TT):
    group = query.shape[2] // key.shape[2]
    key, value = (heads.repeat_interleave(group, dim=2) for heads in (key, value))
    scores_BNTT = torch.einsum("tbnd,sbnd->bnts", query, key) / math.sqrt(query.shape[-1])
    weights_BNTT = scores_BNTT.masked_fill(hidden_TT, float("-inf")).softmax(dim=-1)
    return torch.einsum("bnts,sbnd->tbnd", weights_BNTT, value).reshape(len(query), query.shape[1], -1)


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("explicit_mask", [False, True])
def test_attention_equals_the_formula(num_groups, explicit_mask):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(T, B, N, D, generator=generator)
    key, value = (torch.randn(T, B, num_groups, D, generator=generator) for _ in range(2))
    hidden_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    config = SimpleNamespace(kv_channels=D)
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    mask = hidden_TT[None, None] if explicit_mask else None
    context = attention(query, key, value, mask)
    assert torch.allclose(context, attend_by_formula(query, key, value, hidden_TT), atol=1e-5)

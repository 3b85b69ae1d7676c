import dataclasses

import pytest
import torch

from megatron_adapt.errors import ConfigError
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab.fill import plan_fill
from tests.helpers.tiny import write_byte_tokenizer
from tests.vocab.matrices import Rows, collect, fill_rows, make_sources


def test_the_subtoken_mean_equals_a_hand_computation():
    rows_VH = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, -2.0]])
    pieces = {3: [0, 1], 4: [2], 5: [0, 0, 1, 2]}
    expected = torch.tensor([[2.0, 4.0], [5.0, -2.0], [2.5, 2.0]])
    assert torch.equal(fill_rows("subtoken_mean", rows_VH, pieces), expected)


def test_by_position_the_last_piece_is_heaviest_for_input_and_the_first_for_the_head():
    rows_VH = torch.tensor([[6.0, 0.0], [0.0, 6.0], [0.0, 0.0]])
    pieces = {3: [0, 1], 4: [0, 2, 1]}
    found = [
        fill_rows("subtoken_weighted", rows_VH, pieces, piece_weights="position", is_head=is_head)
        for is_head in (False, True)
    ]
    assert torch.allclose(found[0], torch.tensor([[2.0, 4.0], [1.0, 3.0]]))
    assert torch.allclose(found[1], torch.tensor([[4.0, 2.0], [3.0, 1.0]]))


def test_by_length_a_piece_weighs_its_bytes(tmp_path):
    own = read_tokenizer(write_byte_tokenizer(tmp_path, 300))
    ids = own.tokenizer.get_vocab()
    rows_VH = torch.randn(300, 4)
    sources = make_sources({300: [ids["ab"], ids["c"]], 301: [ids["x"]]}, 300, method="subtoken_weighted")
    _, rows = collect(plan_fill(dataclasses.replace(sources, own=own)), Rows(rows_VH))
    assert torch.allclose(rows[0], (2 * rows_VH[ids["ab"]] + rows_VH[ids["c"]]) / 3, atol=1e-6)
    assert torch.allclose(rows[1], rows_VH[ids["x"]])


def test_without_the_models_tokenizer_lengths_are_not_known():
    message = "vocab.method: subtoken_weighted reads the model's own tokenizer, and none travels with it; put it into"
    with pytest.raises(ConfigError, match=message):
        fill_rows("subtoken_weighted", torch.randn(3, 2), {3: [0]})

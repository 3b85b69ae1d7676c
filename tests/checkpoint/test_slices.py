import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint import slices
from megatron_adapt.checkpoint.layout import list_rules, shape_hf, shape_megatron
from megatron_adapt.checkpoint.slices import count_chunk_rows, list_slices, run_steps
from megatron_adapt.shape import read_shape

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 11,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 23,
}  # fmt: skip


@pytest.mark.parametrize(("slice_bytes", "chunk_bytes"), [(1, 1), (64, 100), (50, 333), (1 << 20, 1 << 20)])
def test_slices_cover_every_row_of_both_sides_once_and_cross_no_chunk(monkeypatch, slice_bytes, chunk_bytes):
    monkeypatch.setattr(slices, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(slices, "CHUNK_BYTES", chunk_bytes)
    shape = read_shape(CONFIG, "c")
    found = list_slices(shape, {rule.megatron: 2 for rule in list_rules(shape)})
    hf, megatron = {}, {}
    for rule in list_rules(shape):
        size = shape_megatron(rule, shape, shape.vocab_size)
        megatron[rule.megatron] = torch.zeros(size[: 2 if rule.stacked else 1])
        for layer in range(shape.num_layers if rule.stacked else 1):
            for name, part in zip(rule.name_hf(layer), shape_hf(rule, shape), strict=True):
                hf[name] = torch.zeros(part[0])
    for item in found:
        row_bytes = 2 if item.key.endswith("norm_weight") or item.key.endswith("norm.weight") else None
        hf[item.hf][item.hf_row : item.hf_row + item.num_rows] += 1
        target = megatron[item.key] if item.layer is None else megatron[item.key][item.layer]
        target[item.row : item.row + item.num_rows] += 1
        if row_bytes:
            step = count_chunk_rows(row_bytes)
            assert item.row // step == (item.row + item.num_rows - 1) // step
            assert item.num_rows == 1 or item.num_rows * row_bytes <= slice_bytes
    assert all(count.eq(1).all() for count in (*hf.values(), *megatron.values()))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_every_open_step_is_done_once_and_what_is_saved_is_done(total, start, save_every):
    start = min(start, total)
    done, saved = [0] * total, []
    lock = threading.Lock()

    def act(step, buffer):
        time.sleep(0.0002 * (step % 3))
        with lock:
            done[step] += 1
        return 1

    def save(count):
        assert all(done[start:count])
        saved.append(count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "SAVE_BYTES", save_every)
        run_steps(range(total), act, start=start, save=save)
    assert done == [0] * start + [1] * (total - start)
    assert saved == sorted(saved)
    assert saved[-1] == total


def test_an_error_of_a_step_ends_the_work_and_is_raised():
    begun = []

    def act(step, buffer):
        begun.append(step)
        if step == 5:
            raise KeyError("five")
        return 1

    threads = torch.get_num_threads()
    with pytest.raises(KeyError, match="five"):
        run_steps(range(10_000), act)
    assert len(begun) < 10_000
    assert torch.get_num_threads() == threads
    assert threading.active_count() < 10


def test_an_error_while_saving_ends_the_work(monkeypatch):
    monkeypatch.setattr(slices, "SAVE_BYTES", 1)

    def save(count):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run_steps(range(100), lambda step, buffer: 1, save=save)

import io
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.archive import ALIGNMENT, Place, can_store, find_values, wrap_values
from megatron_adapt.checkpoint.values import bytes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def _make_archive(tensor):
    head, tail = wrap_values(tuple(tensor.shape), tensor.dtype)
    return head, head + bytes(bytes_of(tensor)) + tail


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_torch_loads_what_is_wrapped_around_plain_values(size, dtype):
    tensor = (torch.randn(size) * 100).to(dtype)
    head, raw = _make_archive(tensor)
    assert len(head) % ALIGNMENT == 0
    for weights_only in (True, False):
        loaded = torch.load(io.BytesIO(raw), weights_only=weights_only)
        assert loaded.dtype == dtype
        assert loaded.is_contiguous()
        assert torch.equal(loaded, tensor)


@given(st.integers(0, 5000), st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_the_values_are_found_wherever_the_archive_lies(tmp_path_factory, offset, dtype):
    path = tmp_path_factory.mktemp("a") / "file"
    tensor = torch.ones(3, 5).to(dtype)
    head, raw = _make_archive(tensor)
    path.write_bytes(b"x" * offset + raw + b"behind")
    with path.open("rb") as file:
        place = Place(path.name, offset, len(raw))
        assert find_values(file.fileno(), place, (3, 5), "f") == offset + len(head)


def test_the_small_records_carry_their_checksums():
    tensor = torch.zeros(0)
    _, raw = _make_archive(tensor)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/byteorder") == b"little"


@pytest.mark.parametrize(("dtype", "known"), [(torch.bfloat16, True), (torch.float8_e4m3fn, False)])
def test_types_without_a_storage_class_are_known(dtype, known):
    assert can_store(dtype) == known

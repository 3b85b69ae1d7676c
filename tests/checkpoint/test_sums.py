import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.checkpoint.sums import FollowingHasher


@given(st.lists(st.integers(0, 5000), max_size=6), st.binary(max_size=64))
def test_sums_are_those_of_the_whole_files_however_they_grew(tmp_path_factory, told, pattern):
    folder = tmp_path_factory.mktemp("files")
    contents = {folder / "one": pattern * 60, folder / "two": pattern[::-1] * 70}
    for path, content in contents.items():
        path.write_bytes(content)
    sizes = {path: len(content) for path, content in contents.items()}
    with FollowingHasher() as hasher:
        for size in told:
            hasher.follow({path: min(size, most) for path, most in sizes.items()})
        found = hasher.finish(sizes)
    assert found == {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}


def test_what_is_not_yet_final_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"ab??")
    with FollowingHasher() as hasher:
        hasher.follow({path: 2})
        hasher.finish({path: 2})
        path.write_bytes(b"abcd")
        assert hasher.finish({path: 4})[path] == hashlib.sha256(b"abcd").hexdigest()


def test_a_file_that_was_cut_meanwhile_stops_the_work(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"ab")
    with FollowingHasher() as hasher, pytest.raises(OSError, match=r"file: ended at 2 bytes of 4"):
        hasher.finish({path: 4})

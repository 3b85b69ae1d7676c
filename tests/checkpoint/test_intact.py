"""What ``files.json`` says of the files of a checkpoint, and what is found wrong with them."""

import hashlib

import pytest

from megatron_adapt.checkpoint.intact import (
    FILES_FILE,
    find_wrong_content,
    find_wrong_size,
    read_record,
    record_files,
    sum_own_files,
)
from megatron_adapt.errors import CheckpointError

CONTENTS = {"__0_0.distcp": b"first" * 99, "__1_0.distcp": b"second" * 99, ".metadata": b"index", "common.pt": b"step"}
LARGE = "__1_0.distcp"


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    for rank in (0, 1):
        sum_own_files(tmp_path, rank)
    record_files(tmp_path)
    return tmp_path


def test_every_file_is_recorded_and_nothing_else_stays(folder):
    record = read_record(folder)
    assert {name: saved.sha256 for name, saved in record.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()
    }
    assert {path.name for path in folder.iterdir()} == {*CONTENTS, FILES_FILE}
    assert find_wrong_size(folder, record) == ""
    assert find_wrong_content(folder, record, list(record)) == ""


def test_what_a_rank_hashed_is_not_read_again(folder):
    for rank in (0, 1):
        sum_own_files(folder, rank)
    (folder / LARGE).write_bytes(b"changed behind the rank that wrote it")
    record_files(folder)
    assert find_wrong_content(folder, read_record(folder), [LARGE]) != ""


def test_a_file_that_is_cut_off_or_gone_is_named(folder):
    record, path = read_record(folder), folder / LARGE
    path.write_bytes(CONTENTS[LARGE][:-1])
    assert find_wrong_size(folder, record) == f"{path}: 593 bytes, but 594 were saved"
    path.unlink()
    assert find_wrong_size(folder, record) == f"{path}: missing"
    assert "cannot be read (No such file" in find_wrong_content(folder, record, [LARGE])


def test_a_changed_byte_is_found_by_content_alone(folder):
    record, path = read_record(folder), folder / LARGE
    path.write_bytes(b"S" + CONTENTS[LARGE][1:])
    assert find_wrong_size(folder, record) == ""
    assert find_wrong_content(folder, record, ["__0_0.distcp"]) == ""
    assert find_wrong_content(folder, record, list(record)) == f"{path}: not the bytes that were saved (SHA-256)"


@pytest.mark.parametrize("raw", ["[", "[1]", '{"a": {"num_bytes": 1}}'])
def test_a_damaged_record_is_refused(folder, raw):
    (folder / FILES_FILE).write_text(raw)
    with pytest.raises(CheckpointError, match=r"files\.json: damaged"):
        read_record(folder)


def test_a_folder_of_before_the_record_says_nothing(tmp_path):
    assert read_record(tmp_path) == {}

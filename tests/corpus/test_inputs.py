from pathlib import Path

import pytest

from megatron_adapt.corpus.inputs import find_files
from megatron_adapt.errors import DataError


def make(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_a_folder_gives_the_files_of_documents_below_it_sorted(tmp_path):
    wanted = make(tmp_path, "a.jsonl", "b.jsonl.zst", "c/d.parquet", "e.jsonl.gz", "f.jsonl.xz")
    texts = make(tmp_path, "g.txt", "h.txt.gz")
    make(tmp_path, "stage.json", "README.md", ".a.jsonl.12.partial")
    assert find_files([tmp_path], "--input") == tuple(wanted)
    assert find_files([tmp_path], "--input", "file") == (*wanted, *texts)


def test_inputs_keep_their_order_and_a_pattern_is_sorted(tmp_path, monkeypatch):
    c1, c2, other, _ = make(tmp_path, "c1", "c2", "x.json", "d/y.json")
    assert find_files([other, tmp_path / "c?", other], "--input") == (other, c1, c2, other)
    assert find_files([tmp_path / "**" / "*.json"], "--input") == (tmp_path / "d" / "y.json", other)
    monkeypatch.chdir(tmp_path)
    assert find_files([Path("c[12]")], "--input") == (Path("c1"), Path("c2"))


def test_a_name_with_signs_of_a_pattern_is_a_file_first(tmp_path):
    (path,) = make(tmp_path, "a[1].jsonl")
    assert find_files([path], "--input") == (path,)


@pytest.mark.parametrize(
    ("name", "plain_text", "message"),
    [
        ("gone.jsonl", "none", r"--input: .*gone\.jsonl is not a file; check the path"),
        ("*.gone", "none", r"--input: no file fits .*\*\.gone; check the pattern"),
        ("", "none", r"--input: .* holds no \.jsonl, \.parquet, or \.txt with --plain-text; name the files"),
        ("", "file", r"--input: .* holds no \.jsonl, \.parquet, \.txt; name the files or a pattern"),
    ],
)
def test_an_input_without_files_is_named(tmp_path, name, plain_text, message):
    with pytest.raises(DataError, match=message):
        find_files([tmp_path / name], "--input", plain_text)

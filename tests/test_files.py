from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_adapt import files
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import (
    STAGE_FILE,
    fingerprint,
    is_finished,
    read_json,
    replace_file,
    replace_folder,
    require_file,
    to_plain,
    write_json,
    write_stage,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    input: tuple[Path, ...]
    size: int = 3


class BoomError(Exception):
    pass


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replace_file(path) as partial:
        partial.write_text("done")
        assert not path.exists()
    assert path.read_text() == "done"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with replace_file(path) as partial:
            partial.write_text("half")
            raise BoomError

    with pytest.raises(BoomError):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    with replace_folder(path) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("done")
        assert not list(path.iterdir())
    assert (path / "sub" / "a.txt").read_text() == "done"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_nothing(tmp_path):
    def write():
        with replace_folder(tmp_path / "out") as partial:
            (partial / "a.txt").write_text("half")
            raise BoomError

    with pytest.raises(BoomError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "precious.txt").write_text("1")
    with (
        pytest.raises(ConfigError, match=r"out: exists already; name another output or add --overwrite$"),
        replace_folder(path),
    ):
        pass
    assert (path / "precious.txt").exists()
    with (
        pytest.raises(ConfigError, match=r"out: holds no stage\.json, so no stage wrote it; name another output"),
        replace_folder(path, overwrite=True),
    ):
        pass
    assert (path / "precious.txt").exists()
    (path / "stage.json").write_text("{}")
    with replace_folder(path, overwrite=True) as partial:
        (partial / "new.txt").write_text("2")
    assert [item.name for item in path.iterdir()] == ["new.txt"]


def test_a_file_in_the_place_of_the_output_folder_is_refused(tmp_path):
    path = tmp_path / "out"
    path.write_text("a file")
    with pytest.raises(ConfigError, match=r"out: is a file; name another"), replace_folder(path):
        pass


def test_a_missing_input_names_its_setting(tmp_path):
    with pytest.raises(DataError, match=r"^--input: .*gone\.jsonl is not a file; check the path$"):
        require_file(tmp_path / "gone.jsonl", "--input")


def test_json_survives_and_damage_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": (1, Path("x")), "b": Settings(input=(Path("y"),))})
    assert read_json(path) == {"a": [1, "x"], "b": {"input": ["y"], "size": 3}}
    path.write_text('{"a": ')
    with pytest.raises(DataError, match=r"a\.json: no valid JSON \(.*\); the file is damaged, write it again$"):
        read_json(path)
    with pytest.raises(DataError, match=r"^gone\.json: .*gone\.json is not a file; check the path$"):
        read_json(tmp_path / "gone.json")


def test_plain_values_hold_nothing_that_json_lacks():
    assert to_plain({1: [Path("a"), ({"b": 2.5},)]}) == {"1": ["a", [{"b": 2.5}]]}


def test_a_fingerprint_sees_content_size_and_names(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    assert fingerprint(one) == fingerprint(two)
    two.write_bytes(b"xyz")
    assert fingerprint(one) != fingerprint(two)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    before = fingerprint(folder)
    (folder / "a").rename(folder / "b")
    assert fingerprint(folder) != before


def test_a_fingerprint_of_a_large_file_reads_samples_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SAMPLE_BYTES", 16)
    path = tmp_path / "large"
    data = bytearray(64 * 16 * 4)
    path.write_bytes(data)
    before = fingerprint(path)
    data[63 * 64 + 3] = 1
    path.write_bytes(data)
    assert fingerprint(path) != before


def test_a_folder_with_a_record_is_known_by_the_record(tmp_path):
    write_json(tmp_path / STAGE_FILE, {"a": 1})
    before = fingerprint(tmp_path)
    (tmp_path / "scratch").write_text("anything")
    assert fingerprint(tmp_path) == before
    write_json(tmp_path / STAGE_FILE, {"a": 2})
    assert fingerprint(tmp_path) != before


def test_a_stage_is_finished_until_config_or_input_change(tmp_path):
    source, record = tmp_path / "in.txt", tmp_path / STAGE_FILE
    source.write_text("text")
    settings = Settings(input=(source,))
    assert not is_finished(record, config=settings)
    write_stage(record, config=settings, inputs=[source], counts={"documents": 3})
    assert read_json(record)["counts"] == {"documents": 3}
    assert read_json(record)["versions"]["python"]
    assert is_finished(record, config=settings)
    assert not is_finished(record, config=Settings(input=(source,), size=4))
    source.write_text("other text")
    assert not is_finished(record, config=settings)
    source.unlink()
    assert not is_finished(record, config=settings)

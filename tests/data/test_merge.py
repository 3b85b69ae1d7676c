import json

import numpy as np
import pytest

from megatron_adapt.config import MergeTokens
from megatron_adapt.data import merge
from megatron_adapt.data.index import bin_path, idx_path, read_tokens
from megatron_adapt.data.merge import merge_tokens
from megatron_adapt.data.record import read_appended_eod, read_record, record_path
from megatron_adapt.errors import ConfigError, DataError
from tests.data.token_files import count_up, make_tokens


@pytest.fixture
def prefixes(tmp_path):
    return make_tokens(tmp_path / "a", count_up(0, 50)), make_tokens(tmp_path / "b", count_up(100, 33, 5))


def test_merged_files_equal_those_written_at_once(prefixes, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "_BLOCK_DOCUMENTS", 3)
    merge_tokens(MergeTokens(prefix=prefixes, output_prefix=tmp_path / "c"))
    expected = make_tokens(tmp_path / "d", [*count_up(0, 50), *count_up(100, 33, 5)])
    for path in (bin_path, idx_path):
        assert path(tmp_path / "c").read_bytes() == path(expected).read_bytes()
    record = read_record(tmp_path / "c")
    assert (record.documents, record.tokens, record.bytes) == (15, 83, 3 * 83)
    assert read_appended_eod(tmp_path / "c") is None


def set_record(prefix, **values):
    stored = json.loads(record_path(prefix).read_text())
    stored["counts"].update(values.pop("counts", {}))
    record_path(prefix).write_text(json.dumps({**stored, **values}))


def test_endings_and_tokenizers_do_not_mix(prefixes, tmp_path):
    config = MergeTokens(prefix=prefixes, output_prefix=tmp_path / "c")
    set_record(prefixes[1], config={"settings": {"append_eod": True}})
    with pytest.raises(DataError, match=r"b: its documents end with token 0, those of .*a with None; tokenise both"):
        merge_tokens(config)
    set_record(prefixes[0], config={"settings": {"append_eod": True}})
    merge_tokens(config)
    assert read_appended_eod(tmp_path / "c") == 0
    set_record(prefixes[1], counts={"tokenizer_fingerprint": "two"})
    with pytest.raises(DataError, match="made by tokenizer two"):
        merge_tokens(MergeTokens(prefix=prefixes, output_prefix=tmp_path / "e"))
    assert not idx_path(tmp_path / "e").exists()


def test_an_output_that_is_there_is_kept(prefixes, tmp_path):
    merge_tokens(MergeTokens(prefix=prefixes, output_prefix=tmp_path / "c"))
    with pytest.raises(ConfigError, match=r"c\.idx: exists already; name another output or add --overwrite"):
        merge_tokens(MergeTokens(prefix=prefixes, output_prefix=tmp_path / "c"))
    merge_tokens(MergeTokens(prefix=prefixes[::-1], output_prefix=tmp_path / "c", overwrite=True))
    assert np.array_equal(read_tokens(tmp_path / "c").tokens_N[:5], [100, 101, 102, 103, 104])
    with pytest.raises(ConfigError, match="is one of the inputs; name another output"):
        merge_tokens(MergeTokens(prefix=prefixes, output_prefix=prefixes[0], overwrite=True))

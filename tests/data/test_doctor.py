import json
import re

import numpy as np
import pytest

from megatron_adapt.config import CheckTokens
from megatron_adapt.data.doctor import CHECKS, check_tokens, examine
from megatron_adapt.data.index import bin_path, idx_path, read_tokens
from megatron_adapt.data.record import record_path
from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.data.token_files import make_tokens
from tests.helpers.tiny import write_byte_tokenizer

EOD = 0


def make(prefix, texts, **record):
    """Token files whose record says that every document ends with id 0."""
    make_tokens(prefix, [np.array(document) for document in texts])
    stored = json.loads(record_path(prefix).read_text())
    stored["config"] = {"settings": {"append_eod": True}}
    stored["counts"].update(record)
    record_path(prefix).write_text(json.dumps(stored))
    return prefix


@pytest.fixture
def healthy(tmp_path):
    return make(tmp_path / "t", [[5, 6, EOD], [7, EOD], [8, 9, 10, EOD]])


def test_healthy_data_have_no_findings(healthy, caplog):
    assert list(examine(healthy)) == []
    with caplog.at_level("INFO"):
        check_tokens(CheckTokens(prefix=(healthy,)))
    assert "nothing wrong" in caplog.text


@pytest.mark.parametrize(
    ("documents", "record", "finding"),
    [
        ([[5, 6], [7, EOD]], {}, r"1 documents do not end with the end-of-document token 0; tokenise again"),
        ([[5, EOD, 6, EOD], [7, EOD]], {}, r"1 end-of-document tokens 0 stand inside documents; the text spells"),
        ([[5, EOD], [EOD]], {}, r"1 documents are empty; leave them out"),
        ([[5, EOD], [], [6, EOD]], {}, r"1 documents are empty"),
        ([[5, EOD], [6, EOD], [5, EOD]], {}, r"1 documents repeat an earlier one; prepare the corpus"),
        ([[5, 999, EOD]], {"vocab_size": 900}, r"1 ids are not below the vocabulary of 900; the \.bin is damaged"),
        ([[5, EOD]], {"vocab_size": 70000}, r"ids are uint16, a vocabulary of 70000 is written as int32"),
        ([[5, EOD]], {"documents": 2}, r"1 documents in the files, 2 in the record; the files are of two runs"),
        ([[5, EOD]], {"tokens": 9}, r"2 tokens in the files, 9 in the record"),
    ],
)
def test_each_fault_is_found_and_nothing_else(tmp_path, documents, record, finding):
    (found,) = examine(make(tmp_path / "t", documents, **record))
    assert re.search(finding, found)


def test_files_that_do_not_open_are_a_finding(healthy):
    data = bin_path(healthy).read_bytes()
    bin_path(healthy).write_bytes(data[:-2])
    (found,) = examine(healthy)
    assert "t.bin: 16 bytes where t.idx describes 18" in found
    idx_path(healthy).unlink()
    (found,) = examine(healthy)
    assert "t.idx: no such file" in found


def test_another_tokenizer_is_a_finding(healthy, tmp_path):
    tokenizer = read_tokenizer(write_byte_tokenizer(tmp_path / "tokenizer"))
    (found,) = examine(healthy, tokenizer)
    assert "made by tokenizer one" in found


def test_data_without_ends_are_not_asked_for_them(tmp_path):
    prefix = make_tokens(tmp_path / "t", [np.array([5, 6]), np.array([7])])
    assert list(examine(prefix)) == []
    assert read_tokens(prefix).num_documents == 2


def test_findings_end_the_tool_with_their_number(healthy, tmp_path, caplog):
    sick = make(tmp_path / "sick", [[5, 6], [5, 6]])
    with pytest.raises(DataError, match="--prefix: 2 findings in 2 datasets; each is named above"):
        check_tokens(CheckTokens(prefix=(healthy, sick)))
    assert "repeat an earlier one" in caplog.text


def test_every_check_has_a_name():
    assert list(CHECKS) == ["counts", "vocabulary", "type", "fingerprint", "ends", "empty", "duplicates"]

import io
from dataclasses import replace

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.model_proto import (
    BYTE,
    Piece,
    append_pieces,
    convert_model,
    list_merges,
    read_model,
    replace_pieces,
    write_model,
)
from tests.tokenizer.bases import ODD_TEXTS, make_texts


@pytest.fixture
def model(bases):
    return read_model(bases["sentencepiece"].folder / "tokenizer.model")


def test_a_model_is_written_back_byte_for_byte(model, tmp_path):
    write_model(model, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model.path.read_bytes()


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.floats(width=32, allow_nan=False), st.integers(1, 5)), max_size=5))
def test_appended_pieces_are_read_back(bases, tmp_path_factory, added):
    model = read_model(bases["sentencepiece"].folder / "tokenizer.model")
    known = {piece.text for piece in model.pieces}
    pieces = [Piece(*item) for item in {item[0]: item for item in added if item[0] not in known}.values()]
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    write_model(append_pieces(model, pieces), path)
    assert read_model(path).pieces == (*model.pieces, *pieces)


def test_sentencepiece_reads_what_was_appended(model, tmp_path):
    path = tmp_path / "tokenizer.model"
    lowest = min(piece.score for piece in model.pieces)
    write_model(append_pieces(model, [Piece("日", lowest - 1), Piece("▁日", lowest - 2)]), path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert processor.encode(" x日", out_type=str)[-1] == "日"
    assert processor.encode("日") == [len(model.pieces) + 1]
    assert processor.vocab_size() == len(model.pieces) + 2


def test_the_conversion_gives_the_ids_of_sentencepiece(model):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model.path))
    converted = convert_model(model, adds_bos=True)
    for text in [*ODD_TEXTS, *make_texts("en", 20), *make_texts("ja", 5)]:
        assert converted.encode(text).ids == [1, *reference.encode(text)]
        assert converted.decode(converted.encode(text).ids) == text.replace("▁", " ")


def test_all_splits_are_listed_in_the_order_of_the_pieces():
    ids = dict.fromkeys(["a", "b", "c", "ab", "bc", "abc"], 0)
    assert list_merges(["bc", "abc"], ids) == [("b", "c"), ("a", "bc"), ("ab", "c")]


def train(path, **changes):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts("en")), model_writer=written, minloglevel=2, **changes
    )
    path.write_bytes(written.getvalue())
    return path


def test_a_unigram_is_converted_too_and_nothing_that_only_looks_like_text_is_chosen(tmp_path):
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    letters = "<>/x0123456789ABCDEFsunk"
    path = train(tmp_path / "tokenizer.model", model_type="unigram", vocab_size=400, required_chars=letters, **plain)
    model = read_model(path)
    assert model.algorithm == "Unigram"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    converted = convert_model(model, adds_bos=False)
    for text in [*ODD_TEXTS, "x<0x41>y", "<0x0A>", *make_texts("en", 20), *make_texts("ja", 5)]:
        assert converted.encode(text).ids == reference.encode(text)
        assert converted.decode(converted.encode(text).ids) == text.replace("▁", " ")
    assert "<0x41>" not in converted.encode("x<0x41>y").tokens


def test_replaced_pieces_and_settings_are_read_back_and_everything_else_stays(model, tmp_path):
    path = tmp_path / "tokenizer.model"
    write_model(replace_pieces(model, list(model.pieces[:300]), model_type=1), path)
    again = read_model(path)
    assert (again.pieces, again.algorithm) == (model.pieces[:300], "Unigram")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    word = next(piece.text for piece in model.pieces[260:] if piece.text.isalpha())
    assert (processor.vocab_size(), processor.encode(word, out_type=str)[-1]) == (300, word)
    write_model(replace_pieces(again, list(model.pieces), model_type=2), path)
    assert path.read_bytes() == model.path.read_bytes()
    write_model(replace_pieces(model, list(model.pieces), add_dummy_prefix=0), path)
    assert not sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("a", out_type=str)[0].startswith("▁")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 60}, "a SentencePiece Unigram without byte fallback"),
        ({"model_type": "word", "vocab_size": 50}, "a SentencePiece Word model is not supported"),
        ({"model_type": "bpe", "vocab_size": 60}, "a SentencePiece BPE without byte fallback"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        read_model(train(tmp_path / "tokenizer.model", **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "normalises text .a character map"),
        ({"normalization_rule_name": "identity"}, "removal of extra spaces"),
        (
            {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False},
            "no leading space",
        ),
    ],
)
def test_a_model_that_normalises_needs_its_json(tmp_path, settings, message):
    path = train(tmp_path / "tokenizer.model", model_type="bpe", vocab_size=320, byte_fallback=True, **settings)
    with pytest.raises(DataError, match=message):
        convert_model(read_model(path), adds_bos=True)


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff\xff\xff\x0f", b"\x80" * 20])
def test_what_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match="no SentencePiece model"):
        read_model(tmp_path / "tokenizer.model")


def test_a_cut_file_is_refused(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model.path.read_bytes()[:-7])
    with pytest.raises(DataError, match="no SentencePiece model, or damaged"):
        read_model(tmp_path / "tokenizer.model")


def test_a_piece_that_occurs_twice_is_refused(model, tmp_path):
    write_model(append_pieces(model, [Piece("in", -1e6), Piece("日", -1e6)]), tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="1 pieces occur twice"):
        read_model(tmp_path / "tokenizer.model")


def test_a_missing_byte_piece_is_refused(model, tmp_path):
    pieces = tuple(piece for piece in model.pieces if piece != next(p for p in model.pieces if p.kind == BYTE))
    write_model(replace(model, pieces=pieces), tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="without byte fallback"):
        read_model(tmp_path / "tokenizer.model")

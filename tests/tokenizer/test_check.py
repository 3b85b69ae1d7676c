from collections import Counter

import pytest

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.append import write_extended
from megatron_adapt.tokenizer.check import check_made, find_unreachable
from megatron_adapt.tokenizer.id_map import map_ids
from megatron_adapt.tokenizer.made import Made
from megatron_adapt.tokenizer.model_proto import read_model, write_model
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer, to_letters
from megatron_adapt.tokenizer.words import strip_tokenizer
from tests.tokenizer.bases import edit_json

SAMPLE = ["the inter", "кот"]


def check(base, folder, sample, **promises):
    after = read_tokenizer(folder)
    made = Made(keeps_ids=True, num_asked=1, reasons=Counter(), sample=sample, num_texts=1, num_bytes=1, **promises)
    return check_made(base, after, map_ids(base, after), made)


def new_piece(base):
    """Two old pieces that the base does not join, as one."""
    pieces = sorted(piece for piece in base.tokenizer.get_vocab() if piece.isalpha() and piece.isascii())
    texts = (left + right for left in pieces for right in pieces if len(left) == len(right) == 3)
    found = next(text for text in texts if len(strip_tokenizer(base).encode(text)) == 2)
    return found.encode()


def test_a_piece_that_no_merge_makes_is_unreachable(base, tmp_path):
    spelled = write_extended(base, [new_piece(base), b"zqzqzq"], tmp_path)
    assert find_unreachable(read_tokenizer(tmp_path), spelled) == {"zqzqzq"}
    with pytest.raises(DataError, match="1 pieces are unreachable"):
        check(base, tmp_path, SAMPLE)


def swap(content):
    vocab = content["model"]["vocab"]
    vocab["in"], vocab["er"] = vocab["er"], vocab["in"]


def test_a_moved_id_is_found(base, tmp_path):
    write_extended(base, [new_piece(base)], tmp_path)
    edit_json(tmp_path / "tokenizer.json", swap)
    with pytest.raises(DataError, match=r"id \d+ of '(in|er)' became \d+"):
        check(base, tmp_path, SAMPLE)


def test_a_changed_added_token_is_found(base, tmp_path):
    write_extended(base, [new_piece(base)], tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda content: content["added_tokens"][0].update(lstrip=True))
    with pytest.raises(DataError, match=r"added token 0 .* became"):
        check(base, tmp_path, SAMPLE)


def test_lost_text_is_found(base, tmp_path):
    write_extended(base, [new_piece(base)], tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(DataError, match=r"'The IN'\.\.\. is decoded otherwise than before"):
        check(base, tmp_path, ["The IN"])


def test_files_that_disagree_are_found(bases, tmp_path):
    base = bases["sentencepiece"]
    spelled = write_extended(base, [new_piece(base)], tmp_path)
    write_model(read_model(base.folder / "tokenizer.model"), tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match=r"has other ids by tokenizer\.model"):
        check(base, tmp_path, [f"\n{spelled[0]}"])


def test_what_a_method_cannot_promise_is_measured(bases, tmp_path, caplog):
    base = bases["sentencepiece"]
    spelled = write_extended(base, [new_piece(base), b"zqzqzq"], tmp_path)
    write_model(read_model(base.folder / "tokenizer.model"), tmp_path / "tokenizer.model")
    figures = check(base, tmp_path, ["the", f"\n{spelled[0]}"], is_safe=False)
    # The old model has neither piece.
    assert (figures["unreachable_by_json"], figures["unreachable_by_model"]) == (1, 2)
    assert (figures["checked_against_model"], figures["differing_from_model"]) == (2, 1)
    said = "1 of 2 new pieces are unreachable by tokenizer.json, 2 by tokenizer.model, and they cut 1 of 2 texts differ"
    assert said in caplog.text


def test_nothing_is_said_where_an_unsafe_method_did_no_harm(base, tmp_path, caplog):
    write_extended(base, [new_piece(base)], tmp_path)
    figures = check(base, tmp_path, SAMPLE, is_safe=False)
    assert not any(figures[f"unreachable_by_{name}"] for name in ("json", "model"))
    assert figures["differing_from_model"] == 0
    assert "unreachable" not in caplog.text


def test_text_that_only_the_new_tokenizer_keeps_is_no_loss(bases, tmp_path):
    folder = tmp_path / "base"
    copy_tokenizer(bases["byte_level"].folder, folder)
    edit_json(folder / "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))
    lossy, made = read_tokenizer(folder), tmp_path / "made"
    made.mkdir()
    write_extended(lossy, [new_piece(lossy)], made)
    edit_json(made / "tokenizer.json", lambda content: content.update(normalizer=None))
    assert check(lossy, made, ["The IN"])["checked_texts"] == 1


def test_figures_count_tokens_of_the_sample(base, tmp_path):
    spelled = write_extended(base, [new_piece(base)], tmp_path)
    figures = check(base, tmp_path, [f"\n{spelled[0]}", "e"])
    size = len(spelled[0]) + 2
    assert figures["checked_texts"] == 2
    # SentencePiece puts a space in front of both texts, here a token of its own.
    tokens = {"byte_level": 3, "sentencepiece": 5}[base.kind]
    assert figures["tokens_per_byte"] == pytest.approx(tokens / size)
    assert figures["base_tokens_per_byte"] == pytest.approx((tokens + 1) / size)
    assert figures["checked_against_model"] == (2 if base.kind == "sentencepiece" else 0)


def test_letters_of_a_byte_level_piece_are_spelled(bases, tmp_path):
    assert write_extended(bases["byte_level"], [b" in\xd0"], tmp_path) == [to_letters(b" in\xd0")]

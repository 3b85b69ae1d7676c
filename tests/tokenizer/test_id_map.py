import json
import random
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.id_map import MAP_FILE, IdMap, map_ids, read_id_map, write_id_map
from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.pieces import byte_letters, copy_tokenizer, piece_bytes, read_content, read_tokenizer
from megatron_adapt.tokenizer.renumber import list_fixed, write_renumbered
from tests.tokenizer.bases import KINDS, edit_json, make_texts


@st.composite
def id_maps(draw):
    base_size, size = draw(st.integers(1, 30)), draw(st.integers(1, 40))
    old = st.integers(0, base_size - 1)
    new = draw(st.sets(st.integers(0, size - 1)))
    # An id beyond the base is new or has moved.
    late = {index for index in range(base_size, size) if index not in new}
    moved = {index: draw(old) for index in sorted({*draw(st.sets(st.integers(0, size - 1))), *late} - new)}
    pieces = {index: draw(st.lists(old, max_size=5)) for index in sorted(new)}
    return IdMap(base_vocab_size=base_size, vocab_size=size, moved=moved, pieces=pieces)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(id_maps())
def test_what_is_written_is_read(bases, tmp_path, id_map):
    write_id_map(id_map, tmp_path)
    read = read_id_map(replace(bases["byte_level"], folder=tmp_path, vocab_size=id_map.vocab_size))
    assert read == id_map
    assert list(read.pieces) == sorted(id_map.pieces)


def test_an_id_is_new_moved_or_the_same():
    id_map = IdMap(base_vocab_size=4, vocab_size=5, moved={1: 3}, pieces={4: [0, 2]})
    assert [id_map.old_id(index) for index in range(5)] == [0, 3, 2, 3, None]


def shuffle(base, folder, seed, num_dropped):
    """Write a base with all ids drawn anew, and without some of its last merges."""
    content = read_content(base)["model"]
    vocab = base.tokenizer.get_vocab(with_added_tokens=True)
    last = [piece for piece in sorted(vocab, key=vocab.get) if piece not in list_fixed(base) and len(piece) > 1]
    dropped = set(last[len(last) - num_dropped :])
    kept = [piece for piece in vocab if piece not in dropped]
    merges = [pair for pair in content["merges"] if not dropped & {*pair, "".join(pair)}]
    ids = list(range(len(kept)))
    random.Random(seed).shuffle(ids)
    folder.mkdir(exist_ok=True)
    model = {**content, "vocab": dict(zip(kept, ids, strict=True)), "merges": merges}
    write_renumbered(base, model, None, folder)
    return read_tokenizer(folder), dropped


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 40))
def test_tokens_are_found_wherever_they_moved_and_dropped_ones_are_named_by_none(
    bases, tmp_path_factory, kind, seed, num_dropped
):
    base = bases[kind]
    made, dropped = shuffle(base, tmp_path_factory.mktemp("shuffled"), seed, num_dropped)
    id_map = map_ids(base, made)
    old, new = (tokenizer.tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (base, made))
    assert not id_map.pieces
    assert id_map.moved == {index: old[piece] for piece, index in new.items() if old[piece] != index}
    kept = {id_map.old_id(index) for index in range(made.vocab_size)}
    assert {old[piece] for piece in dropped} == set(range(base.vocab_size)) - kept
    assert (id_map.base_vocab_size, id_map.vocab_size) == (base.vocab_size, base.vocab_size - num_dropped)
    # The other way round what was dropped is new, and spelt with what the smaller one has.
    back = map_ids(made, base)
    surfaces, small = piece_bytes(base), piece_bytes(made)
    assert set(back.pieces) == {old[piece] for piece in dropped}
    for index, olds in back.pieces.items():
        assert b"".join(small[part] for part in olds) == surfaces[index]
    for index in range(made.vocab_size):
        assert back.old_id(id_map.old_id(index)) == index


def test_a_tokenizer_is_its_own_map(base):
    id_map = map_ids(base, base)
    assert (id_map.moved, id_map.pieces) == ({}, {})


def test_pieces_of_another_family_are_found_by_their_bytes(bases, tmp_path):
    texts = [*chain(*(make_texts(language, 100) for language in ("en", "ru")))]
    for kind, other in (KINDS, reversed(KINDS)):
        base, folder = bases[kind], tmp_path / other
        learn_base_tokenizer(texts, 500, other, folder)
        made = read_tokenizer(folder)
        id_map = map_ids(base, made)
        old, new = piece_bytes(base), piece_bytes(made)
        assert any(b" " in new[index] and len(new[index]) > 1 for index in id_map.moved)
        for index in range(made.vocab_size):
            if not new[index]:
                # Neither family has the other's special tokens, and these have no text to spell.
                assert id_map.pieces[index] == []
            elif index in id_map.pieces:
                assert new[index] not in old
                assert b"".join(old[part] for part in id_map.pieces[index]) == new[index]
            else:
                assert old[id_map.old_id(index)] == new[index]


def test_a_byte_of_one_family_is_the_letter_of_the_other_where_it_has_one(bases):
    base, made = bases["sentencepiece"], bases["byte_level"]
    id_map = map_ids(base, made)
    old, letters = base.tokenizer.get_vocab(with_added_tokens=True), byte_letters()
    found = {byte: id_map.old_id(made.tokenizer.token_to_id(letters[byte])) for byte in range(256)}
    assert found == {
        byte: old.get(chr(byte) if 32 < byte < 128 else "▁" if byte == 32 else "", old[f"<0x{byte:02X}>"])
        for byte in range(256)
    }
    assert "e" in old


def test_letters_that_spell_bytes_are_no_characters(bases, tmp_path):
    # Both have a token written "Ã" under one id: here the byte C3, there a letter of two bytes.
    base, other = bases["byte_level"], bases["sentencepiece"]
    at = base.tokenizer.token_to_id("Ã")
    content = read_content(other)["model"]
    vocab = {piece: index for piece, index in content["vocab"].items() if index != 419}
    vocab = {piece: 419 if index == at else index for piece, index in vocab.items()}
    merges = [pair for pair in content["merges"] if "".join(pair) in vocab and set(pair) <= vocab.keys()]
    write_renumbered(other, {**content, "vocab": {**vocab, "Ã": at}, "merges": merges}, None, tmp_path)
    letters = byte_letters()
    spelling = [base.tokenizer.token_to_id(letters[byte]) for byte in "Ã".encode()]
    assert map_ids(base, read_tokenizer(tmp_path)).pieces[at] == spelling


def test_part_of_a_character_is_spelt_with_byte_pieces(bases, tmp_path):
    learn_base_tokenizer(make_texts("ja", 50), 300, "byte_level", tmp_path)
    base, made = bases["sentencepiece"], read_tokenizer(tmp_path)
    id_map = map_ids(base, made)
    surfaces = piece_bytes(made)
    parts = [index for index in id_map.pieces if surfaces[index] and surfaces[index].decode(errors="ignore") == ""]
    assert parts
    for index in parts:
        spelling = [base.tokenizer.id_to_token(old) for old in id_map.pieces[index]]
        assert spelling == [f"<0x{byte:02X}>" for byte in surfaces[index]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, r"not of the form that tools/build_tokenizer\.py writes; make it again"),
        ({"pieces": [1]}, r"not of the form"),
        ({"moved": {"x": 1}}, r"not of the form"),
        ({"vocab_size": 421}, r"maps 421 ids, the tokenizer has 420; the two files do not belong together"),
        ({"moved": {"3": 420}}, r"id 3 has no old id below 420"),
        ({"base_vocab_size": 419}, r"id 419 has no old id below 419"),
        ({"pieces": {"3": [1, -1]}}, r"id 3 is spelt by \[1, -1\], not all below 420"),
        ({"pieces": {"420": [1]}}, r"id 420 is spelt by \[1\]"),
    ],
)
def test_a_map_that_cannot_be_is_refused(base, tmp_path, changes, message):
    copy_tokenizer(base.folder, tmp_path)
    made = read_tokenizer(tmp_path)
    write_id_map(map_ids(base, made), tmp_path)
    edit_json(tmp_path / MAP_FILE, lambda content: content.update(changes))
    with pytest.raises(DataError, match=message) as caught:
        read_id_map(made)
    assert "\n" not in str(caught.value)


def test_a_missing_or_a_damaged_map_is_refused(base, tmp_path):
    copy_tokenizer(base.folder, tmp_path)
    made = read_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"no added_pieces\.json, so it is unknown how its new tokens were spelt; make"):
        read_id_map(made)
    for content in ("[]", "null", json.dumps({"base_vocab_size": 420})):
        (tmp_path / MAP_FILE).write_text(content)
        with pytest.raises(DataError, match="not of the form"):
            read_id_map(made)

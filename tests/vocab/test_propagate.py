"""Learned Embedding Propagation: what the map is, and that nothing else of the instruct model changes."""

import json
import logging

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.tokenizer.append import write_extended
from megatron_adapt.tokenizer.id_map import map_ids, write_id_map
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer
from tests.tokenizer.bases import CHAT, TOOL, edit_json
from tests.vocab.trios import EMBEDDING, HEAD, WIDTH, change_model, draw, extend, list_pieces, make_trio


def same_bytes(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def list_kept(folder):
    """Return the ids of the added tokens of a tokenizer."""
    return sorted(read_tokenizer(folder).tokenizer.get_added_tokens_decoder())


def list_mapped(trio, output):
    """Return the ids of the result whose rows come through the map."""
    size = read_tokenizer(trio.adapted).vocab_size
    return sorted(set(range(size)) - set(list_kept(output)))


def build_t(trio, *, only_shared=False):
    """Return the dense matrix of the old pieces of each new token."""
    own, made = read_tokenizer(trio.base), read_tokenizer(trio.adapted)
    id_map = map_ids(own, made)
    lines = []
    for index in range(made.vocab_size):
        old = id_map.old_id(index)
        pieces = [old] if old is not None else [] if only_shared else id_map.pieces[index]
        line = torch.zeros(own.vocab_size, dtype=torch.float64)
        for piece in pieces:
            line[piece] += 1 / len(pieces)
        if pieces:
            lines.append(line)
    return torch.stack(lines)


@pytest.mark.parametrize("method", ["overlap", "conversion"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_linear_image_is_recovered_for_input_and_head_each_by_its_own_map(tmp_path, own, method, tied):
    maps = {name: draw(WIDTH, seed) for seed, name in enumerate((EMBEDDING, HEAD))}
    trio = make_trio(tmp_path, own, tied=tied, maps=maps)
    after = trio.propagate(tmp_path / "out", method)
    assert (HEAD in after.names) == (not tied)
    ids = list_mapped(trio, tmp_path / "out")
    assert len(ids) > 400
    for name in trio.names:
        expected = HFFolder(trio.adapted).read(name)[ids] @ maps[name]
        assert torch.allclose(after.read(name)[ids], expected, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("method", ["swap", "overlap", "conversion"])
def test_an_instruct_model_with_the_rows_of_its_base_gets_the_adapted_rows(tmp_path, own, method):
    trio = make_trio(tmp_path, own, maps=dict.fromkeys((EMBEDDING, HEAD), torch.eye(WIDTH)))
    after = trio.propagate(tmp_path / "out", method)
    ids = list_mapped(trio, tmp_path / "out")
    for name in trio.names:
        assert torch.allclose(after.read(name)[ids], HFFolder(trio.adapted).read(name)[ids], atol=1e-6)


@pytest.mark.parametrize("method", ["overlap", "conversion"])
def test_the_map_is_the_least_squares_map_of_the_re_expressed_rows(tmp_path, own, method):
    trio = make_trio(tmp_path, own)
    after = trio.propagate(tmp_path / "out", method)
    t = build_t(trio, only_shared=method == "overlap")
    ids = list_mapped(trio, tmp_path / "out")
    for name in trio.names:
        a, b = (HFFolder(folder).read(name)[: t.shape[1]].double() for folder in (trio.base, trio.instruct))
        found = torch.linalg.lstsq(t @ a, t @ b, driver="gelsy").solution
        expected = (HFFolder(trio.adapted).read(name)[ids].double() @ found).float()
        assert torch.allclose(after.read(name)[ids], expected, rtol=1e-5, atol=1e-6), name


def test_with_the_same_vocabulary_conversion_is_the_fit_of_all_rows_and_equals_overlap(tmp_path, own):
    trio = make_trio(tmp_path, own, made=own)
    after, overlap = (trio.propagate(tmp_path / method, method) for method in ("conversion", "overlap"))
    a, b = (HFFolder(folder).read(EMBEDDING)[: own.vocab_size].double() for folder in (trio.base, trio.instruct))
    found = torch.linalg.lstsq(a, b, driver="gelsy").solution
    ids = list_mapped(trio, tmp_path / "conversion")
    expected = HFFolder(trio.adapted).read(EMBEDDING)[ids].double() @ found
    assert torch.allclose(after.read(EMBEDDING)[ids].double(), expected, atol=1e-5)
    assert torch.equal(after.read(HEAD), overlap.read(HEAD))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_swap_copies_rows_and_any_method_copies_the_body_bit_by_bit(tmp_path, own, tied):
    trio = make_trio(tmp_path, own, tied=tied, dtype=torch.bfloat16)
    instruct = HFFolder(trio.instruct)
    for method in ("swap", "conversion"):
        after = trio.propagate(tmp_path / method, method)
        assert set(after.names) == set(instruct.names)
        for name in set(instruct.names) - set(trio.names):
            assert same_bytes(after.read(name), instruct.read(name)), name
    ids = list_mapped(trio, tmp_path / "swap")
    for name in trio.names:
        adapted, swapped = HFFolder(trio.adapted).read(name), HFFolder(tmp_path / "swap").read(name)
        assert same_bytes(swapped[ids], adapted[ids])
        assert HFFolder(tmp_path / "conversion").dtype(name) == torch.bfloat16


@pytest.mark.parametrize("method", ["swap", "conversion"])
def test_the_rows_of_the_tokens_that_the_instruct_model_added_are_its_own(tmp_path, own, method):
    trio = make_trio(tmp_path, own)
    after = trio.propagate(tmp_path / "out", method)
    theirs, ours = read_tokenizer(trio.instruct).tokenizer, read_tokenizer(tmp_path / "out").tokenizer
    made = read_tokenizer(trio.adapted)
    ids = {token.content: index for index, token in theirs.get_added_tokens_decoder().items()}
    assert {CHAT, TOOL} < set(ids)
    for content, index in ids.items():
        new = ours.token_to_id(content)
        assert made.tokenizer.token_to_id(content) in (None, new)
        for name in trio.names:
            assert same_bytes(after.read(name)[new], HFFolder(trio.instruct).read(name)[index]), content
    assert ours.token_to_id(CHAT) == made.vocab_size
    assert after.shape(EMBEDDING)[0] == made.vocab_size + 2


def test_transformers_loads_the_result_and_it_chats(tmp_path, own):
    trio = make_trio(tmp_path, own)
    edit_json(trio.instruct / "tokenizer_config.json", lambda content: content.update(model_max_length=77))
    index = read_tokenizer(trio.instruct).tokenizer.token_to_id(CHAT)
    (trio.instruct / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, index], "pad_token_id": -1}))
    trio.propagate(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = read_tokenizer(trio.adapted)
    assert len(tokenizer) == model.config.vocab_size == made.vocab_size + 2
    assert tokenizer.model_max_length == 77
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "日本語学"}], tokenize=True, return_dict=False)
    assert ids.count(made.vocab_size) == 1
    assert ids[-2:] == [made.tokenizer.encode(text).ids[-1] for text in ("日本", "語学")]
    assert model.generation_config.eos_token_id == [1, made.vocab_size]
    assert model.generation_config.pad_token_id == -1
    assert model(torch.tensor([ids])).logits.isfinite().all()
    for text in ("the ker lo 日本語学 пре", " 東京日本\n", "one <s> two"):
        plain = made.tokenizer.encode(text).ids
        assert tokenizer(text).input_ids == plain
        assert read_tokenizer(tmp_path / "out").tokenizer.encode(f"{text}{CHAT}").ids == [*plain, made.vocab_size]


def test_the_map_of_ids_that_lies_beside_the_adapted_tokenizer_is_used(tmp_path, bases):
    trio = make_trio(tmp_path, bases["byte_level"])
    own, made = read_tokenizer(trio.base), read_tokenizer(trio.adapted)
    expected = trio.propagate(tmp_path / "computed").read(EMBEDDING)
    write_id_map(map_ids(own, made), trio.adapted)
    assert torch.equal(trio.propagate(tmp_path / "read").read(EMBEDDING), expected)
    edit_json(
        trio.adapted / "added_pieces.json",
        lambda content: content.update(pieces={new: [5] for new in content["pieces"]}),
    )
    assert not torch.equal(trio.propagate(tmp_path / "spelt").read(EMBEDDING), expected)


def test_a_map_from_an_intermediate_vocabulary_is_not_used(tmp_path, bases):
    own = bases["byte_level"]
    first = extend(own, tmp_path / "first")
    (tmp_path / "second").mkdir()
    write_extended(first, ["学語".encode()], tmp_path / "second")
    trio = make_trio(tmp_path / "trio", own, made=read_tokenizer(tmp_path / "second"))
    expected = trio.propagate(tmp_path / "computed").read(EMBEDDING)
    write_id_map(map_ids(first, read_tokenizer(trio.adapted)), trio.adapted)
    assert torch.equal(trio.propagate(tmp_path / "again").read(EMBEDDING), expected)


def test_a_replaced_vocabulary_takes_the_rows_of_its_own_tokens(tmp_path, bases):
    trio = make_trio(tmp_path, bases["byte_level"], made=bases["sentencepiece"])
    after = trio.propagate(tmp_path / "out")
    assert after.shape(EMBEDDING)[0] == read_tokenizer(tmp_path / "out").vocab_size
    assert read_tokenizer(tmp_path / "out").kind == "sentencepiece"


def test_spare_rows_are_dropped_and_may_hold_anything(tmp_path, bases):
    own = bases["byte_level"]
    trio = make_trio(tmp_path, own, vocab_size=own.vocab_size + 5)
    spare = torch.full((3, WIDTH), torch.nan)
    for folder in (trio.base, trio.adapted, trio.instruct):
        rows = {name: HFFolder(folder).read(name) for name in trio.names}
        size = read_tokenizer(folder).vocab_size
        rows = {name: torch.cat([old[:size], spare]) for name, old in rows.items()}
        change_model(folder, tmp_path / "changed" / folder.name, read_tokenizer(folder), rows)
    expected = trio.propagate(tmp_path / "expected").read(HEAD)
    trio.base, trio.adapted, trio.instruct = (tmp_path / "changed" / name for name in ("base", "adapted", "instruct"))
    assert torch.equal(trio.propagate(tmp_path / "out").read(HEAD), expected)


# ---------------------------------------------------------------- the body


def train_body(trio):
    """Change the body of the adapted model; return the differences by name."""
    source = HFFolder(trio.adapted)
    moves = {name: 0.1 * torch.randn_like(source.read(name)) for name in source.names if name not in trio.names}
    moved = {name: source.read(name) + move for name, move in moves.items()}
    moved |= {name: source.read(name) for name in trio.names}
    tokenizer = read_tokenizer(trio.adapted)
    trio.adapted = change_model(trio.adapted, trio.adapted.with_name("trained"), tokenizer, moved)
    return moves


@pytest.mark.parametrize("share", [0.5, 1.0, -1.0])
def test_a_share_of_what_training_changed_in_the_body_is_added(byte_trio, tmp_path, share):
    moves = train_body(byte_trio)
    after = byte_trio.propagate(tmp_path / "out", body_delta=share)
    for name, move in moves.items():
        expected = HFFolder(byte_trio.instruct).read(name) + share * move
        assert torch.allclose(after.read(name), expected, atol=1e-6), name


def test_a_trained_body_that_is_left_out_is_said(byte_trio, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "megatron_adapt")
    byte_trio.propagate(tmp_path / "before")
    assert "body" not in caplog.text
    num_changed = len(train_body(byte_trio))
    byte_trio.propagate(tmp_path / "after")
    assert f"{num_changed} of {num_changed} tensors of its body differ from the base's" in caplog.text
    caplog.clear()
    byte_trio.propagate(tmp_path / "added", body_delta=1.0)
    assert "body" not in caplog.text


# ---------------------------------------------------------------- tokens that changed in the instruct model alone


def rename_token(folder, before, after):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(json.dumps(before), json.dumps(after)))


def add_token(folder, content):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(content, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_reserved_token_that_the_instruct_model_uses_keeps_its_place_and_its_row(tmp_path, own):
    for name in ("own", "used"):
        (tmp_path / name).mkdir()
        copy_tokenizer(own.folder, tmp_path / name)
        add_token(tmp_path / name, "<|reserved_0|>")
    rename_token(tmp_path / "used", "<|reserved_0|>", "<|im_start|>")
    base, chat = read_tokenizer(tmp_path / "own"), read_tokenizer(tmp_path / "used")
    maps = {name: draw(WIDTH, seed) for seed, name in enumerate((EMBEDDING, HEAD))}
    trio = make_trio(tmp_path / "trio", base, made=extend(base, tmp_path / "made"), chat=chat, maps=maps)
    index = own.vocab_size
    rows = {name: HFFolder(trio.instruct).read(name) for name in trio.names}
    for name in trio.names:
        rows[name][index] = 1000.0
    trio.instruct = change_model(trio.instruct, tmp_path / "instruct", chat, rows)
    after = trio.propagate(tmp_path / "out")
    found = read_tokenizer(tmp_path / "out")
    assert found.tokenizer.id_to_token(index) == "<|im_start|>"
    assert found.tokenizer.token_to_id("<|reserved_0|>") is None
    assert found.vocab_size == own.vocab_size + 1 + len(list_pieces(own.kind))
    assert found.tokenizer.encode("a<|im_start|>b").ids.count(index) == 1
    for name in trio.names:
        assert (after.read(name)[index] == 1000).all()
        # That row is no image of the base's, and the fit must not see it.
        expected = HFFolder(trio.adapted).read(name)[index + 1 :] @ maps[name]
        assert torch.allclose(after.read(name)[index + 1 :], expected, rtol=1e-4, atol=1e-4)

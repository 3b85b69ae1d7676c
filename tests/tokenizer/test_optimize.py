import json
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.id_map import read_id_map
from megatron_adapt.tokenizer.mix import read_mix
from megatron_adapt.tokenizer.optimize import rank_pieces, reduce_tokenizer
from megatron_adapt.tokenizer.pieces import piece_bytes, read_tokenizer
from megatron_adapt.tokenizer.words import strip_tokenizer
from tests.helpers.tiny import write_byte_tokenizer
from tests.tokenizer.bases import CHAT, KINDS, MIXED, TEMPLATE, TOOL, make_texts, write_chat_base, write_corpus
from tests.tokenizer.guarantees import encode, encode_by_model, encode_by_transformers

NUM_ADDED = 90


def make_config(base_folder, output, new=None, old=None, **changes):
    corpora = {
        name: write_corpus(output.parent / f"{output.name}.{name}.jsonl", texts)
        for name, texts in (("new", new or make_texts("ru")), ("old", old or make_texts("en")))
    }
    made = TokenizerSettings(method="optimize", **{"size": str(NUM_ADDED), **changes})
    return BuildTokenizer(
        base=base_folder, corpus=(corpora["new"],), old_corpus=(corpora["old"],), output=output, settings=made
    )


def optimize(base_folder, output, *texts, **changes):
    """Drop half of a base's pieces and add some of another language."""
    build_tokenizer(make_config(base_folder, output, *texts, **changes))
    return read_tokenizer(output)


def list_learned(tokenizer):
    """Every piece of more than a byte that is no added token, in the order of the ids."""
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    vocab = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    return [
        piece
        for piece, index in sorted(vocab.items(), key=lambda item: item[1])
        if index not in added and not piece.startswith("<0x") and (tokenizer.kind == "sentencepiece" or len(piece) > 1)
    ]


def count_slowly(base, texts):
    """Count every piece that exists at some time while the base's merges cut the texts, by their definition."""
    merges = [tuple(pair) for pair in json.loads(base.tokenizer.to_str())["model"]["merges"]]
    ranks = {pair: rank for rank, pair in reversed([*enumerate(merges)])}
    builds = Counter()
    for text in texts:
        for token in base.tokenizer.encode(text, add_special_tokens=False).tokens:
            parts = [token] if token.startswith("<0x") else list(token)
            builds.update(parts)
            while known := [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]:
                at = min(known)[1]
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
                builds[parts[at]] += 1
    return builds


@pytest.fixture(scope="module")
def chat_bases(bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    return {kind: write_chat_base(base, root / kind) for kind, base in bases.items()}


@pytest.fixture(scope="module")
def optimized(chat_bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("optimized")
    return {kind: optimize(base.folder, root / kind) for kind, base in chat_bases.items()}


def test_the_pieces_kept_are_the_most_built_ones_and_ids_close_up(tmp_path):
    merges = [("t", "h"), ("th", "e"), ("a", "b"), ("c", "d"), ("cd", "e"), ("x", "y")]
    base = write_byte_tokenizer(tmp_path / "base", merges=merges)
    # th 4, the 4, ab 2, cd 2 and once in cde, cde 1, xy 0.
    old = ["the\nthe\nthe\nab\ncd", "the\nab\ncd\ncde"]
    made = optimize(base, tmp_path / "out", ["жж\nthe ab"], old, size="1", old_share=1.0)
    vocab = made.tokenizer.get_vocab(with_added_tokens=True)
    pieces = sorted(vocab, key=vocab.get)
    before = read_tokenizer(base).tokenizer.get_vocab()
    assert pieces[:258] == sorted(before, key=before.get)[:258]
    assert pieces[258:261] == ["th", "the", "cd"]
    assert len(pieces) == 262
    report = json.loads((made.folder / "report.json").read_text())
    assert (report["candidates"]["base piece kept"], report["candidates"]["base piece dropped"]) == (3, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kept_piece_is_built_at_least_as_often_as_every_dropped_one(chat_bases, optimized, kind):
    base, made = chat_bases[kind], optimized[kind]
    config = make_config(base.folder, made.folder.parent / f"{kind}-again")
    ranked, _ = rank_pieces(base, list_learned(base), config)
    slow = count_slowly(base, read_mix(config))
    assert all(ranked[piece] == slow[piece] for piece in list_learned(base))
    kept = {piece for piece in list_learned(made)[:-NUM_ADDED] if len(piece) > 1}
    dropped = {piece for piece in list_learned(base) if len(piece) > 1} - kept
    assert len(kept) == round(0.5 * len(kept | dropped))
    assert min(slow[piece] for piece in kept) >= max(slow[piece] for piece in dropped) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_all_readers_agree_and_no_text_is_lost(optimized, kind):
    made = optimized[kind]
    ids = encode(made, MIXED)
    assert encode_by_transformers(made, MIXED) == ids
    expected = MIXED
    if kind == "sentencepiece":
        assert encode_by_model(made, MIXED) == ids
        expected = [text.replace("▁", " ") for text in MIXED]
    assert made.tokenizer.decode_batch(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_the_chat_template_and_the_order_of_ids_are_kept(chat_bases, optimized, kind):
    base, made = chat_bases[kind], optimized[kind]
    old, new = (tokenizer.tokenizer.get_added_tokens_decoder() for tokenizer in (base, made))
    assert list(map(str, new.values())) == list(map(str, old.values()))
    assert (made.bos_id, made.eos_id, made.adds_bos) == (base.bos_id, base.eos_id, True)
    id_map = read_id_map(made)
    kept = [id_map.old_id(index) for index in range(made.vocab_size) if index not in id_map.pieces]
    first = kept[: made.vocab_size - NUM_ADDED]
    assert first == sorted(first)
    assert kept.index(420) < 420
    loaded = AutoTokenizer.from_pretrained(made.folder)
    assert loaded.chat_template == TEMPLATE
    ids = loaded.apply_chat_template([{"role": "user", "content": "the"}], return_dict=False)
    assert ids[:2] == [made.bos_id, made.tokenizer.token_to_id(CHAT)]
    text = f"the {CHAT}the {TOOL}"
    assert loaded(text)["input_ids"] == made.tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_comes_out_and_the_size_is_what_is_added(chat_bases, optimized, kind):
    base, made = chat_bases[kind], optimized[kind]
    bare = strip_tokenizer(made)
    for piece in list_learned(made):
        assert bare.encode(piece).ids == [made.tokenizer.token_to_id(piece)]
    candidates = json.loads((made.folder / "report.json").read_text())["candidates"]
    num_fixed = base.vocab_size - len(list_learned(base))
    assert made.vocab_size == num_fixed + candidates["base piece kept"] + NUM_ADDED
    num_learned = len(list_learned(base))
    assert sum(candidates.get(f"base piece {what}", 0) for what in ("kept", "dropped", "unreachable")) == num_learned


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_language_gets_short_and_the_old_one_hardly_longer(chat_bases, optimized, kind):
    counts = {
        language: [
            sum(map(len, encode(tokenizer, make_texts(language, 60, seed=5))))
            for tokenizer in (chat_bases[kind], optimized[kind])
        ]
        for language in ("en", "ru")
    }
    assert counts["ru"][1] < 0.5 * counts["ru"][0]
    assert counts["en"][1] < 1.5 * counts["en"][0]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KINDS), st.lists(st.sampled_from(MIXED), min_size=1, max_size=9), st.floats(0, 1))
def test_a_vocabulary_that_ends_anywhere_in_the_ranking_builds_all_its_pieces(
    bases, tmp_path_factory, kind, texts, share
):
    base, root = bases[kind], tmp_path_factory.mktemp("front")
    ranked, _ = rank_pieces(base, list_learned(base), make_config(base.folder, root / "out", [*texts, "the"]))
    kept = sorted(ranked, key=lambda piece: (len(piece) > 1, -ranked[piece]))[: round(share * len(ranked))]
    letters = [piece for piece in ranked if len(piece) == 1 and piece not in kept]
    reduce_tokenizer(base, [*kept, *letters], root)
    reduced = read_tokenizer(root)
    assert set(list_learned(reduced)) == {*kept, *letters}
    bare = strip_tokenizer(reduced)
    assert all(bare.encode(piece).ids == [reduced.tokenizer.token_to_id(piece)] for piece in list_learned(reduced))
    # What it cuts with nothing but kept pieces, it cuts as the base did.
    for text in texts:
        tokens = base.tokenizer.encode(text).tokens
        if not set(tokens) & (set(ranked) - {*kept, *letters}):
            assert reduced.tokenizer.encode(text).tokens == tokens
    if kind == "sentencepiece":
        assert encode_by_model(reduced, texts) == encode(reduced, texts)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_all_may_be_kept(base, tmp_path, share):
    made = optimize(base.folder, tmp_path / "out", kept_share=share)
    old, new = set(list_learned(base)), set(list_learned(made))
    long = {piece for piece in old if len(piece) > 1}
    assert (long <= new) if share else (len(long & new) < 0.3 * len(long))
    assert encode_by_transformers(made, MIXED) == encode(made, MIXED)


def test_a_dropped_piece_that_is_learned_again_takes_its_old_row(base, tmp_path):
    made = optimize(base.folder, tmp_path / "out", make_texts("en"), kept_share=0.2)
    id_map = read_id_map(made)
    old = base.tokenizer.get_vocab(with_added_tokens=True)
    again = [piece for piece in list_learned(made)[-NUM_ADDED:] if piece in old]
    assert again
    assert all(id_map.old_id(made.tokenizer.token_to_id(piece)) == old[piece] for piece in again)
    surfaces = piece_bytes(base)
    assert all(b"".join(surfaces[part] for part in olds) in piece_bytes(made) for olds in id_map.pieces.values())


def test_a_model_that_stands_alone_is_optimized_to_both_files(bases, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((bases["sentencepiece"].folder / "tokenizer.model").read_bytes())
    made = optimize(folder, tmp_path / "out")
    assert encode_by_transformers(made, MIXED) == encode_by_model(made, MIXED) == encode(made, MIXED)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scripts": ("Cyrilic",)}, ConfigError, r"'Cyrilic' is no Unicode script"),
        ({"scripts": ("Thai",)}, DataError, r"documents hold no new piece in Thai 2 times"),
        ({"min_frequency": 10**6}, DataError, r"documents hold no new piece 1000000 times"),
        ({"new": [" "]}, DataError, r"--corpus: .* hold no text|no new piece"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(base, tmp_path, changes, error, message):
    make = partial(optimize, base.folder, tmp_path / "out")
    with pytest.raises(error, match=message) as caught:
        make(changes["new"]) if "new" in changes else make(**changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_old_corpus_is_named(base, tmp_path):
    corpus = write_corpus(tmp_path / "ru.jsonl", make_texts("ru"))
    config = BuildTokenizer(
        base=base.folder, corpus=(corpus,), output=tmp_path / "out", settings=TokenizerSettings(method="optimize")
    )
    with pytest.raises(ConfigError, match="--old-corpus: missing; method optimize counts the old language too"):
        build_tokenizer(config)

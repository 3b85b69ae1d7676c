"""Rows and ids of a model under a tokenizer that moves ids: which rows stay, and what the configs name."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import BuildTokenizer, ResizeVocab, TokenizerSettings
from megatron_adapt.errors import CheckpointError
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.id_map import IdMap, read_id_map
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer
from megatron_adapt.vocab.fit import list_runs, renumber_companions
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.tiny import write_llama
from tests.tokenizer.bases import CHAT, learn_base, make_texts, write_chat_base, write_corpus

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
WAYS = [
    ("byte_level", {"method": "replace", "size": "400"}),
    ("sentencepiece", {"method": "replace", "size": "400"}),
    ("sentencepiece", {"method": "replace", "size": "400", "model": "unigram"}),
    ("byte_level", {"method": "optimize", "size": "60"}),
    ("sentencepiece", {"method": "optimize", "size": "60"}),
]


@st.composite
def id_maps(draw):
    olds = draw(st.lists(st.one_of(st.none(), st.integers(0, 19)), min_size=1, max_size=30))
    moved = {new: old for new, old in enumerate(olds) if old not in (None, new)}
    pieces = {new: [0] for new, old in enumerate(olds) if old is None}
    return IdMap(base_vocab_size=20, vocab_size=len(olds), moved=moved, pieces=pieces)


@given(id_maps(), st.integers(0, 35), st.integers(0, 35))
def test_runs_name_every_kept_row_of_a_block_once_and_are_as_long_as_can_be(id_map, start, stop):
    runs = list(list_runs(id_map, start, stop))
    rows = [(new + at, old + at) for new, old, count in runs for at in range(count)]
    block = range(start, min(stop, id_map.vocab_size))
    assert rows == [(new, id_map.old_id(new)) for new in block if id_map.old_id(new) is not None]
    ends = [(new + count, old + count) for new, old, count in runs]
    assert not set(ends) & {(new, old) for new, old, _ in runs}


@pytest.fixture(scope="module")
def chat_bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    kinds = ("byte_level", "sentencepiece")
    return {kind: write_chat_base(learn_base(root / f"plain-{kind}", kind), root / kind) for kind in kinds}


@pytest.fixture(params=WAYS, ids=["-".join(map(str, (kind, *way.values()))) for kind, way in WAYS])
def made(request, chat_bases, tmp_path):
    """A base, a model of it with two ends of text, and a tokenizer made from it."""
    kind, settings = request.param
    base = chat_bases[kind]
    chat = base.tokenizer.token_to_id(CHAT)
    model = write_llama(
        tmp_path / "model",
        vocab_size=base.vocab_size,
        dtype=torch.bfloat16,
        tokenizer=False,
        bos_token_id=base.bos_id,
        eos_token_id=[base.eos_id, chat],
        pad_token_id=chat,
    )
    copy_tokenizer(base.folder, model)
    ru, en = (write_corpus(tmp_path / f"{language}.jsonl", make_texts(language)) for language in ("ru", "en"))
    build_tokenizer(
        BuildTokenizer(
            base=model,
            corpus=(ru,),
            old_corpus=(en,),
            output=tmp_path / "tokenizer",
            settings=TokenizerSettings(**settings),
        )
    )
    return base, model, read_tokenizer(tmp_path / "tokenizer")


def test_rows_go_with_their_tokens_bit_by_bit_and_configs_name_the_same_tokens(made, tmp_path):
    base, model, tokenizer = made
    resize_vocab(ResizeVocab(model=model, tokenizer=tokenizer.folder, output=tmp_path / "out"))
    before, after = HFFolder(model), HFFolder(tmp_path / "out")
    old, new = (item.tokenizer.get_vocab(with_added_tokens=True) for item in (base, tokenizer))
    shared = sorted(old.keys() & new.keys())
    assert any(old[piece] != new[piece] for piece in shared)
    assert old.keys() - new.keys()
    id_map = read_id_map(tokenizer)
    for name in MATRICES:
        rows, found = before.read(name), after.read(name)
        assert found.shape == (tokenizer.vocab_size, 32)
        taken, given_rows = found[[new[piece] for piece in shared]], rows[[old[piece] for piece in shared]]
        assert torch.equal(taken.view(torch.int16), given_rows.view(torch.int16))
        for index, olds in id_map.pieces.items():
            assert torch.equal(found[index], rows[olds].double().mean(0).bfloat16())
    for name in set(before.names) - set(MATRICES):
        assert torch.equal(before.read(name).view(torch.int16), after.read(name).view(torch.int16))
    chat = new[CHAT]
    assert chat != old[CHAT]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for config in (loaded.config, loaded.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, [tokenizer.eos_id, chat])
        assert config.pad_token_id == chat
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == loaded.config.vocab_size == tokenizer.vocab_size


def write_configs(folder, config, generation):
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))


def test_only_ids_of_tokens_change_and_values_that_name_none_stay(tmp_path):
    id_map = IdMap(base_vocab_size=6, vocab_size=5, moved={1: 5, 2: 3}, pieces={4: [0]})
    config = {"bos_token_id": 0, "eos_token_id": [5, 3], "pad_token_id": -1, "vocab_size": 5, "hidden_size": 3}
    generation = {"forced_bos_token_id": None, "suppress_tokens": [3, 5], "max_length": 3, "eos_token_id": 6}
    write_configs(tmp_path, config, generation)
    renumber_companions(tmp_path, id_map)
    assert json.loads((tmp_path / "config.json").read_text()) == {**config, "eos_token_id": [1, 2]}
    # 6 is no token of the base.
    changed = json.loads((tmp_path / "generation_config.json").read_text())
    assert changed == {**generation, "suppress_tokens": [2, 1]}


def test_files_without_moved_ids_stay_byte_for_byte(tmp_path):
    write_configs(tmp_path, {"bos_token_id": 0, "eos_token_id": [1, 2]}, {"pad_token_id": None})
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    renumber_companions(tmp_path, IdMap(base_vocab_size=3, vocab_size=4, moved={}, pieces={3: [0]}))
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_a_token_named_by_a_config_that_is_gone_is_refused(tmp_path):
    write_configs(tmp_path, {"bos_token_id": 0}, {"eos_token_id": [0, 2]})
    id_map = IdMap(base_vocab_size=3, vocab_size=2, moved={}, pieces={})
    with pytest.raises(
        CheckpointError,
        match=r"generation_config\.json: eos_token_id 2 is a token that the new tokenizer lacks; correct",
    ):
        renumber_companions(tmp_path, id_map)

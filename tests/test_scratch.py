import orjson
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_adapt.checkpoint.hf import read_hf_shape
from megatron_adapt.config import BaseSettings, CreateBase
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import STAGE_FILE, is_finished, read_json
from megatron_adapt.scratch import create_base
from megatron_adapt.tokenizer.pieces import encode_texts, read_tokenizer

SETTINGS = {
    "vocab_size": 320,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": 64,
}


def create(tmp_path, name="base", overwrite=False, **changes):
    corpus = tmp_path / "en.jsonl"
    sentences = [f"the {animal} saw {number} other animals" for animal in ("cat", "dog", "owl") for number in range(50)]
    corpus.write_bytes(b"".join(orjson.dumps({"text": sentence}) + b"\n" for sentence in sentences))
    config = CreateBase(
        corpus=(corpus,),
        output=tmp_path / name,
        overwrite=overwrite,
        settings=BaseSettings(**{**SETTINGS, **changes}),
    )
    create_base(config)
    return config


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_transformers_loads_the_folder_and_agrees_on_the_tokens(tmp_path, kind):
    folder = create(tmp_path, tokenizer_kind=kind).output
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), read_tokenizer(folder)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == tokenizer.vocab_size == 320
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.eos_id is not None
    text = "the owl saw 7 dogs"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == encode_texts(tokenizer, [text])[0]


@pytest.mark.parametrize("tied", [False, True])
def test_the_shape_is_the_one_asked_for(tmp_path, tied):
    config = create(tmp_path, tied=tied)
    shape = read_hf_shape(config.output)
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (2, 32, 48)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.kv_channels) == (4, 2, 8)
    assert (shape.max_position_embeddings, shape.tied) == (64, tied)
    assert read_json(config.output / STAGE_FILE)["counts"] == {"vocab_size": 320, "parameters": shape.num_parameters}
    assert is_finished(config.output / STAGE_FILE, config=config)


def test_a_seed_decides_the_weights(tmp_path):
    torch.manual_seed(5)
    one, two, other = (
        load_file(create(tmp_path, name, seed=seed).output / "model.safetensors")
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_the_random_state_of_the_process_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    create(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, r"^base\.hidden_size: 30 does not give 4 heads an even width; use a multiple of 8$"),
        ({"hidden_size": 36}, r"^base\.hidden_size: 36 does not give 4 heads an even width; use a multiple of 8$"),
        ({"num_query_groups": 3}, r"^base\.num_query_groups: 3 does not divide num_attention_heads 4; use a divisor"),
    ],
)
def test_an_impossible_shape_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        create(tmp_path, **changes)
    assert not (tmp_path / "base").exists()


def test_a_missing_corpus_is_refused(tmp_path):
    config = CreateBase(corpus=(tmp_path / "gone.jsonl",), output=tmp_path / "base")
    with pytest.raises(DataError, match=r"^--corpus: .*gone\.jsonl is not a file; check the path$"):
        create_base(config)


def test_an_output_is_replaced_only_when_told(tmp_path):
    create(tmp_path)
    with pytest.raises(ConfigError, match=r"base: exists already; name another output or add --overwrite$"):
        create(tmp_path)
    create(tmp_path, overwrite=True)

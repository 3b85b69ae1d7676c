import math
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_adapt.checkpoint import slices
from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.layout import list_rules
from megatron_adapt.checkpoint.root import read_description
from megatron_adapt.checkpoint.weights import fill, load_weights, weights_state_dict
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint, Layout
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.errors import CheckpointError
from tests.helpers.spawn import run_ranks
from tests.helpers.tensors import compare_shards
from tests.helpers.tiny import write_llama


def _convert(folder: Path, **settings) -> Path:
    write_llama(folder / "hf", **settings)
    pad = CheckpointSettings(vocab_pad_multiple=64)
    convert_checkpoint(ConvertCheckpoint(source=folder / "hf", to="megatron", output=folder / "megatron", settings=pad))
    return folder / "megatron" / "release"


def _build(release: Path, layout: Layout, padded_vocab_size: int | None = None):
    description = read_description(release)
    return build_model(
        description.shape,
        padded_vocab_size=padded_vocab_size or description.padded_vocab_size,
        layout=layout,
        seq_length=16,
        bf16=False,
    )


def _load_and_compare(release: Path, tensor_size: int, pipeline_size: int) -> dict[tuple, int]:
    """Load on this layout and compare every shard with its box of the checkpoint; return the boxes and their sizes."""
    layout = Layout(tensor_model_parallel_size=tensor_size, pipeline_model_parallel_size=pipeline_size)
    with start_engine(layout, seed=0):
        model = _build(release, layout)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 7.0)
        load_weights([model], release)
        return compare_shards(weights_state_dict([model]), DistReader(release))


@pytest.mark.parametrize(
    ("tensor_size", "pipeline_size", "tied"), [(2, 1, False), (1, 2, True)], ids=["tp2", "pp2_tied"]
)
def test_a_converted_checkpoint_loads_under_every_layout(tmp_path, tensor_size, pipeline_size, tied):
    release = _convert(tmp_path, tie_word_embeddings=tied)
    boxes = {}
    for found in run_ranks(_load_and_compare, 2, release, tensor_size, pipeline_size):
        boxes.update(found)
    reader = DistReader(release)
    keys = [rule.megatron for rule in list_rules(read_description(release).shape)]
    loaded = {key: sum(size for (name, _), size in boxes.items() if name == key) for key in keys}
    assert loaded == {key: math.prod(reader.shape(key)) for key in keys}
    assert {name for name, _ in boxes} == set(keys)


def test_biases_and_small_chunks_load_under_tensor_parallelism(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "CHUNK_BYTES", 2000)
    config = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "hf")
    pad = CheckpointSettings(vocab_pad_multiple=64)
    convert_checkpoint(
        ConvertCheckpoint(source=tmp_path / "hf", to="megatron", output=tmp_path / "megatron", settings=pad)
    )
    boxes = {}
    for found in run_ranks(_load_and_compare, 2, tmp_path / "megatron" / "release", 2, 1):
        boxes.update(found)
    bias = {offset: size for (key, offset), size in boxes.items() if key.endswith("linear_qkv.bias")}
    assert bias == {(layer, start): 32 for layer in range(2) for start in (0, 32)}


def test_stock_megatron_core_finds_every_key_it_asks_for(tmp_path, monkeypatch):
    release = _convert(tmp_path)
    with start_engine(Layout(), seed=0):
        # The engine's model but with megatron-core's own layers, and its whole state dictionary: a strict load.
        monkeypatch.setattr("megatron_adapt.engine.llama.SDPACoreAttention", _stock_core_attention())
        model = _build(release, Layout())
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group})}
        asked = [key for key in state["model"] if key.endswith("_extra_state")]
        assert len(asked) == 8
        loaded = dist_checkpointing.load(state, str(release), strict="raise_unexpected")
        model.load_state_dict(loaded["model"], strict=True)
        assert loaded["checkpoint_version"] == 3.0
        assert torch.equal(
            model.embedding.word_embeddings.weight, DistReader(release).read("embedding.word_embeddings.weight")
        )


def _stock_core_attention():
    return get_gpt_layer_local_spec(normalization="RMSNorm").submodules.self_attention.submodules.core_attention


def test_what_megatron_core_saves_is_read_without_it(tmp_path):
    release = _convert(tmp_path)
    saved = tmp_path / "saved"
    saved.mkdir()
    with start_engine(Layout(), seed=0):
        model = _build(release, Layout())
        load_weights([model], release)
        dist_checkpointing.save({**weights_state_dict([model]), "iteration": 3}, str(saved))
    before, after = DistReader(release), DistReader(saved)
    assert sorted(before.keys) == sorted(after.keys)
    assert all(torch.equal(before.read(key), after.read(key)) for key in before.keys)


def test_loading_casts_to_the_type_of_the_model(tmp_path):
    release = _convert(tmp_path, dtype=torch.bfloat16)
    with start_engine(Layout(), seed=0):
        model = _build(release, Layout())
        load_weights([model], release)
        expected = DistReader(release).read("output_layer.weight").float()
        assert torch.equal(model.output_layer.weight, expected)


@pytest.mark.parametrize("size", [256, 384], ids=["cut", "zeros"])
def test_a_matrix_of_another_size_is_never_cut_or_filled(tmp_path, size):
    release = _convert(tmp_path)
    with start_engine(Layout(), seed=0):
        model = _build(release, Layout(), padded_vocab_size=size)
        with pytest.raises(CheckpointError, match=rf"embeddings.* has shape \(320, 32\), the model \({size}, 32\)"):
            load_weights([model], release)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    tied = _convert(tmp_path / "tied", tie_word_embeddings=True)
    untied = _convert(tmp_path / "untied")
    with start_engine(Layout(), seed=0):
        model = _build(untied, Layout())
        with pytest.raises(CheckpointError, match=r"no tensor output_layer\.weight; this is the checkpoint of another"):
            load_weights([model], tied)


class Quantised(torch.nn.Linear):
    """A layer with a state beside its tensors, as those of Transformer Engine have it."""

    def get_extra_state(self):
        return torch.zeros(3)

    def set_extra_state(self, state):
        raise AssertionError("nothing was saved")


def test_quantisation_states_that_were_not_saved_stay_what_they_are():
    model = torch.nn.Sequential(Quantised(2, 2, bias=False))
    assert "0._extra_state" in model.state_dict()
    fill(model, {"0.weight": torch.eye(2)})
    assert torch.equal(model[0].weight, torch.eye(2))


@pytest.mark.parametrize("values", [{}, {"0.weight": torch.eye(2), "0.bias": torch.zeros(2)}], ids=["less", "more"])
def test_a_model_is_filled_with_all_its_values_and_no_others(values):
    with pytest.raises(AssertionError, match=r"0\.(weight|bias)"):
        fill(torch.nn.Sequential(Quantised(2, 2, bias=False)), values)

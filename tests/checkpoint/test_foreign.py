import json
import logging
import os
import types
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.transformer.enums import AttnBackend

from megatron_adapt.checkpoint.dist import COMMON_FILE
from megatron_adapt.checkpoint.hf import read_hf_shape
from megatron_adapt.checkpoint.inspect import describe_megatron
from megatron_adapt.checkpoint.opened import open_checkpoint
from megatron_adapt.checkpoint.root import read_description
from megatron_adapt.config import Layout
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.errors import CheckpointError, ConfigError
from tests.helpers.evil import MakesFolder
from tests.helpers.fused import fuse_weights, make_arguments
from tests.helpers.spawn import run_ranks
from tests.helpers.tensors import assert_same_tensors, convert_to_hf
from tests.helpers.tiny import write_byte_tokenizer, write_llama

PADDED = 320


def _save_dist(hf: Path, root: Path, layout: Layout, metadata: dict, renames: dict, common: dict) -> None:
    _save_all(hf, {root: metadata}, layout, renames, common)


def _save_all(hf: Path, roots: dict[Path, dict], layout: Layout, renames: dict, common: dict) -> None:
    """Save a model as Megatron-LM does, quantisation states and args included; once for each kind of metadata.

    Beside each torch_dist folder stands what the same ranks hold, as partitions.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype="auto")
    fused = fuse_weights(model, PADDED)
    with start_engine(layout, seed=0):
        rank, size = parallel_state.get_tensor_model_parallel_rank(), layout.tensor_model_parallel_size
        shape = read_hf_shape(hf)
        core = build_model(shape, padded_vocab_size=PADDED, layout=layout, seq_length=16, bf16=False)
        core.to(model.dtype)
        with torch.no_grad():
            for name, parameter in core.named_parameters():
                parameter.copy_(_cut(name, fused[name], rank, size).view_as(parameter))
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for root, metadata in roots.items():
            folder = root / "iter_0000007"
            state = core.sharded_state_dict(metadata={"dp_cp_group": group, **metadata})
            apply_factories(state)
            for value in nested_values(state):
                for old, new in renames.items():
                    value.key = value.key.replace(old, new)
            folder.mkdir(parents=True, exist_ok=True)
            dist_checkpointing.save({**common, "model": state}, str(folder))
            (root / "latest_checkpointed_iteration.txt").write_text("7")
            own = folder.with_name("partitions") / f"mp_rank_{rank:02d}"
            own.mkdir(parents=True)
            torch.save({**common, "model": core.state_dict_for_save_checkpoint()}, own / "model_optim_rng.pt")


def _cut(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    if "norm" in name:
        return whole
    if "linear_proj" in name or "linear_fc2" in name:
        return whole.chunk(size, 1)[rank]
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size)[rank]


def _common(hf: Path, **changes) -> dict:
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype="auto")
    args = make_arguments(model, PADDED, attention_backend=AttnBackend.auto, **changes)
    return {"args": args, "checkpoint_version": 3.0, "iteration": 7, "rerun_state_machine": types.SimpleNamespace(a=1)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and its torch_dist checkpoint of one rank with stacked layers."""
    folder = tmp_path_factory.mktemp("saved")
    write_llama(folder / "hf_model", dtype=torch.bfloat16)
    _save_dist(folder / "hf_model", folder / "root", Layout(), {}, {}, _common(folder / "hf_model"))
    return folder


def _copy(saved: Path, tmp_path: Path, common: object = None) -> Path:
    """Copy the checkpoint of the fixture, with another ``common.pt``."""
    folder = tmp_path / "root" / "iter_0000007"
    folder.mkdir(parents=True)
    for path in (saved / "root" / "iter_0000007").iterdir():
        os.link(path, folder / path.name)
    (tmp_path / "root" / "latest_checkpointed_iteration.txt").write_text("7")
    if common is not None:
        (folder / COMMON_FILE).unlink()
        torch.save(common, folder / COMMON_FILE)
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("metadata", "renames"),
    [
        ({}, {}),
        ({}, {"linear_qkv.layer_norm_weight": "_", "self_attention._": "input_layernorm.weight",
              "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}),
        ({"non_homogeneous_layers": True}, {}),
        ({"singleton_local_shards": True}, {}),
    ],
    ids=["stacked", "local_names", "a_key_per_layer", "gate_and_up_apart"],
)  # fmt: skip
def test_what_megatron_core_saved_becomes_the_model_it_came_from(tmp_path, metadata, renames):
    hf = write_llama(tmp_path / "hf_model", dtype=torch.bfloat16, num_key_value_heads=2)
    _save_dist(hf, tmp_path / "root", Layout(), metadata, renames, _common(hf))
    out = convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf, verify=True)
    assert_same_tensors(hf, out)
    assert read_hf_shape(out) == read_hf_shape(hf)
    assert (out / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_two_tensor_parallel_ranks_and_a_tied_head_are_merged(tmp_path):
    hf = write_llama(tmp_path / "hf_model", tie_word_embeddings=True)
    layout = Layout(tensor_model_parallel_size=2)
    roots = {tmp_path / "stacked": {}, tmp_path / "apart": {"singleton_local_shards": True}}
    run_ranks(_save_all, 2, hf, roots, layout, {}, _common(hf, tensor_model_parallel_size=2))
    for root in roots:
        assert_same_tensors(hf, convert_to_hf(root, tmp_path / f"{root.name}_out", tokenizer=hf))
    assert_same_tensors(hf, convert_to_hf(tmp_path / "apart" / "partitions", tmp_path / "out", tokenizer=hf))


def test_biases_of_queries_keys_and_values_are_kept(tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "hf_model")
    hf = write_byte_tokenizer(tmp_path / "hf_model", 300)
    _save_dist(hf, tmp_path / "root", Layout(), {}, {}, _common(hf))
    out = convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf)
    assert_same_tensors(hf, out)
    assert read_hf_shape(out) == read_hf_shape(hf)


def test_transformers_loads_the_config_that_args_made(saved, tmp_path):
    out = convert_to_hf(saved / "root", tmp_path / "out", tokenizer=saved / "hf_model")
    ids_BT = torch.arange(20)[None]
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(ids_BT).logits
        for folder in (out, saved / "hf_model")
    ]
    assert torch.equal(*logits)
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (0, 1, "bfloat16")


def test_llama3_scaling_takes_the_numbers_of_megatron_core(saved, tmp_path):
    common = _common(saved / "hf_model", use_rope_scaling=True, rope_scaling_factor=32.0, rotary_base=500000)
    out = convert_to_hf(_copy(saved, tmp_path, common), tmp_path / "out", tokenizer=saved / "hf_model")
    shape = read_hf_shape(out)
    assert shape.rotary_base == 500000.0
    assert vars(shape.rope_scaling) == {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


def test_the_true_vocabulary_has_to_be_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"has 320 vocabulary rows, padding included, .* --tokenizer DIR$"):
        convert_to_hf(saved / "root", tmp_path / "out")
    root = _copy(saved, tmp_path, _common(saved / "hf_model", tokenizer_model="/models/ours"))
    with pytest.raises(CheckpointError, match=r"--tokenizer DIR \(its args say '/models/ours'\)"):
        convert_to_hf(root, tmp_path / "out")
    write_byte_tokenizer(tmp_path / "large", 330)
    with pytest.raises(CheckpointError, match="has 320 vocabulary rows, the tokenizer 330 tokens"):
        convert_to_hf(saved / "root", tmp_path / "out", tokenizer=tmp_path / "large")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_would_be_padded_otherwise_is_warned_of(saved, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        opened = open_checkpoint(saved / "root", saved / "hf_model")
        assert opened.description.true_vocab_size == 300
        assert "would pad" not in caplog.text
        root = _copy(saved, tmp_path, _common(saved / "hf_model", make_vocab_size_divisible_by=128))
        open_checkpoint(root, saved / "hf_model")
    assert "would pad 300 tokens to 384 rows, the checkpoint has 320" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, r"args\.num_experts 8 is not supported"),
        ({"normalization": "LayerNorm"}, r"args\.normalization 'LayerNorm' is not supported, only 'RMSNorm'"),
        ({"swiglu": False}, r"args\.swiglu False is not supported"),
        ({"position_embedding_type": "learned_absolute"}, r"args\.position_embedding_type 'learned_absolute'"),
        ({"add_bias_linear": True}, r"args\.add_bias_linear True"),
        ({"rotary_percent": 0.5}, r"args\.rotary_percent 0\.5"),
        ({"qk_layernorm": True}, r"args\.qk_layernorm True"),
        ({"multi_latent_attention": True}, r"args\.multi_latent_attention True"),
        ({"window_size": (4096, 0)}, r"args\.window_size \(4096, 0\)"),
        ({"mtp_num_layers": 1}, r"args\.mtp_num_layers 1"),
    ],
)
def test_what_the_engine_computes_otherwise_is_refused_by_name_and_value(saved, tmp_path, changes, message):
    root = _copy(saved, tmp_path, _common(saved / "hf_model", **changes))
    with pytest.raises(ConfigError, match=message):
        convert_to_hf(root, tmp_path / "out", tokenizer=saved / "hf_model")
    assert "not supported" in describe_megatron(root)["model"]["unknown"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None}, r"its args lack num_layers"),
        ({"max_position_embeddings": None, "seq_length": None}, "neither max_position_embeddings nor seq_length"),
        ({"num_layers": 3}, r"has 2 layers, the settings of the run say 3"),
        ({"hidden_size": 64, "kv_channels": 8}, r"has shape \(320, 32\), its config says \(320, 64\)"),
        ({"add_qkv_bias": True}, r"no tensor self_attention\.linear_qkv\.bias of layer 0"),
    ],
)
def test_args_that_do_not_fit_the_tensors_are_refused(saved, tmp_path, changes, message):
    root = _copy(saved, tmp_path, _common(saved / "hf_model", **changes))
    with pytest.raises(CheckpointError, match=message):
        convert_to_hf(root, tmp_path / "out", tokenizer=saved / "hf_model")


def test_an_older_order_of_rows_is_refused(saved, tmp_path):
    root = _copy(saved, tmp_path, {**_common(saved / "hf_model"), "checkpoint_version": 1.0})
    with pytest.raises(CheckpointError, match=r"checkpoint_version 1\.0 orders its tensors in another way"):
        convert_to_hf(root, tmp_path / "out", tokenizer=saved / "hf_model")


def test_without_args_the_config_beside_the_checkpoint_tells_the_model(saved, tmp_path):
    root = _copy(saved, tmp_path, {"iteration": 7})
    with pytest.raises(CheckpointError, match=r"neither adapt\.json nor args .* put its config\.json into .*hf"):
        convert_to_hf(root, tmp_path / "out", tokenizer=saved / "hf_model")
    (root / "hf").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        os.link(saved / "hf_model" / name, root / "hf" / name)
    assert_same_tensors(saved / "hf_model", convert_to_hf(root, tmp_path / "out"))


def test_a_config_beside_it_that_contradicts_the_args_is_refused(saved, tmp_path):
    root = _copy(saved, tmp_path, _common(saved / "hf_model", rotary_base=500000))
    (root / "hf").mkdir()
    os.link(saved / "hf_model" / "config.json", root / "hf" / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is that of another model"):
        convert_to_hf(root, tmp_path / "out", tokenizer=saved / "hf_model")


def test_a_tensor_that_no_llama_has_is_never_left_out(tmp_path):
    hf = write_llama(tmp_path / "hf_model")
    renames = {"decoder.final_layernorm.weight": "decoder.final_norm.weight"}
    _save_dist(hf, tmp_path / "root", Layout(), {}, renames, _common(hf))
    with pytest.raises(CheckpointError, match=r"no tensor decoder\.final_layernorm\.weight"):
        convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf)
    common = _common(hf, untie_embeddings_and_output_weights=False, num_layers=1)
    _save_dist(hf, tmp_path / "layers", Layout(), {"non_homogeneous_layers": True}, {}, common)
    with pytest.raises(CheckpointError, match=r"7 tensors that a Llama of 1 layers lacks, first decoder\.layers\.1"):
        convert_to_hf(tmp_path / "layers", tmp_path / "out", tokenizer=hf)


def test_names_of_other_programs_are_refused_with_an_example(tmp_path):
    hf = write_llama(tmp_path / "hf_model")
    renames = {"embedding.word_embeddings": "module.embedding.word_embeddings"}
    _save_dist(hf, tmp_path / "root", Layout(), {}, renames, {"iteration": 7})
    with pytest.raises(CheckpointError, match=r"no tensor embedding\.word.*, only module\.embedding\.word_embeddings"):
        convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf)


def test_code_in_common_pt_does_not_run(saved, tmp_path):
    common = {**_common(saved / "hf_model"), "extra": MakesFolder(tmp_path / "ran")}
    common["args"].evil = MakesFolder(tmp_path / "ran_too")
    out = convert_to_hf(_copy(saved, tmp_path, common), tmp_path / "out", tokenizer=saved / "hf_model")
    assert_same_tensors(saved / "hf_model", out)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "ran_too").exists()


def test_inspect_tells_the_model_the_step_and_the_padded_rows(saved):
    found = describe_megatron(saved / "root")
    assert found["format"] == "Megatron torch_dist of another program"
    assert found["model"]["num_layers"] == 2
    assert "vocab_size" not in found["model"]
    assert found["vocabulary"]["rows"] == PADDED
    assert found["vocabulary"]["true size"].startswith("unknown")
    assert found["position"] == {
        "step": 7, "consumed_train_samples": 448, "seq_length": 64, "tokenizer_type": "HuggingFaceTokenizer",
    }  # fmt: skip


def test_other_stages_ask_for_a_conversion_first(saved):
    with pytest.raises(CheckpointError, match=r"no adapt\.json, .* tools/convert_checkpoint\.py --to hf, then"):
        read_description(saved / "root" / "iter_0000007")

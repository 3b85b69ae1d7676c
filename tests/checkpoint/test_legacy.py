import io
import logging
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers

from megatron_adapt.checkpoint import saved
from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import read_hf_shape
from megatron_adapt.checkpoint.inspect import describe_megatron
from megatron_adapt.checkpoint.opened import open_checkpoint
from megatron_adapt.checkpoint.root import find_checkpoint, is_megatron_checkpoint
from megatron_adapt.checkpoint.values import read_values
from megatron_adapt.config import ConvertCheckpoint
from megatron_adapt.errors import CheckpointError, ConfigError
from tests.helpers.evil import MakesFolder
from tests.helpers.fused import fuse_weights, make_arguments, name_fused
from tests.helpers.tensors import assert_same_tensors, convert_to_hf
from tests.helpers.tiny import write_llama

PADDED, LAYERS = 320, 4


def _cut_rows(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return what a tensor-parallel rank holds."""
    if "norm" in name:
        return whole.clone()
    if "linear_proj" in name or "linear_fc2" in name:
        return whole.chunk(size, 1)[rank].clone()
    if "linear_fc1" in name:
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return whole.chunk(size)[rank].clone()


def _cut_stages(fused: dict[str, torch.Tensor], counts: list[int]) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of each run of layers, renumbered from 0; the first has the embedding, the last the head."""
    chunks, first = [], 0
    for at, count in enumerate(counts):
        chunk = {}
        for name, tensor in fused.items():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                if first <= int(parts[2]) < first + count:
                    parts[2] = str(int(parts[2]) - first)
                    chunk[".".join(parts)] = tensor
            elif (name.startswith("embedding") and at == 0) or (name[0] in "do" and at == len(counts) - 1):
                chunk[name] = tensor
        chunks.append(chunk)
        first += count
    return chunks


def _write_partitions(
    hf: Path, root: Path, tp: int, pp: int, vpp: int = 1, *, counts: list[int] | None = None, fused_names: bool = True,
    **said,
) -> Path:  # fmt: skip
    """Cut a model into the partitions that Megatron-LM would save; return the folder of the iteration."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype="auto")
    fused = fuse_weights(model, PADDED)
    args = make_arguments(
        model, PADDED, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None, make_vocab_size_divisible_by=64 // tp,
    )  # fmt: skip
    args = Namespace(**{**vars(args), **said})
    runs = _cut_stages(fused, counts or [LAYERS // (pp * vpp)] * (pp * vpp))
    folder = root / "iter_0000010"
    for stage in range(pp):
        for rank in range(tp):
            chunks = []
            for run in runs[stage::pp]:
                chunk = {name: _cut_rows(name, whole, rank, tp) for name, whole in run.items()}
                chunk = {name_fused(name) if fused_names else name: tensor for name, tensor in chunk.items()}
                chunk["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"state")
                chunks.append(chunk)
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            named = {"model": chunks[0]} if vpp == 1 else {f"model{at}": chunk for at, chunk in enumerate(chunks)}
            content = {"args": args, "checkpoint_version": 3.0, "iteration": 10, **named}
            content["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(10)}}, "param_groups": [{"lr": 1e-3}]}
            (folder / name).mkdir(parents=True)
            torch.save(content, folder / name / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


def _write_model(folder: Path, **settings) -> Path:
    return write_llama(folder, num_hidden_layers=LAYERS, **settings)


def _change(folder: Path, name: str, change) -> None:
    path = folder / name / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 4, 1), (2, 2, 2)],
    ids=["one", "tp2", "pp2", "tp2_pp2", "pp4", "tp2_pp2_vpp2"],
)  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True, "head_dim": 16}], ids=["untied", "tied_wide"])
def test_partitions_become_the_model_they_were_cut_from(tmp_path, tp, pp, vpp, settings):
    hf = _write_model(tmp_path / "hf_model", dtype=torch.bfloat16, **settings)
    _write_partitions(hf, tmp_path / "root", tp, pp, vpp)
    out = convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf, verify=True)
    assert_same_tensors(hf, out)
    assert read_hf_shape(out) == read_hf_shape(hf)


def test_local_names_of_the_norms_are_known_too(tmp_path):
    hf = _write_model(tmp_path / "hf_model")
    folder = _write_partitions(hf, tmp_path / "root", 2, 1, fused_names=False)
    assert_same_tensors(hf, convert_to_hf(folder, tmp_path / "out", tokenizer=hf))


@pytest.mark.parametrize(("vpp", "counts"), [(1, [1, 3]), (2, [1, 2, 1, 0])], ids=["uneven", "interleaved"])
def test_uneven_stages_are_numbered_by_the_layers_they_hold(tmp_path, vpp, counts):
    hf = _write_model(tmp_path / "hf_model")
    folder = _write_partitions(hf, tmp_path / "root", 1, 2, vpp, counts=counts)
    for stage in range(2):  # the extra state of a layer that the last chunk does not have
        _change(folder, f"mp_rank_00_{stage:03d}", _drop_extra_states)
    assert_same_tensors(hf, convert_to_hf(folder, tmp_path / "out", tokenizer=hf))


def _drop_extra_states(content: dict) -> None:
    for key in [key for key in content if key.startswith("model")]:
        content[key] = {name: value for name, value in content[key].items() if "_extra_state" not in name}


def test_the_last_stage_of_a_tied_model_holds_the_embedding_again(tmp_path):
    hf = _write_model(tmp_path / "hf_model", tie_word_embeddings=True)
    folder = _write_partitions(hf, tmp_path / "root", 2, 2)
    for rank in range(2):
        first = torch.load(folder / f"mp_rank_0{rank}_000" / "model_optim_rng.pt", weights_only=False)
        head = first["model"]["embedding.word_embeddings.weight"]
        _set(f"mp_rank_0{rank}_001", "output_layer.weight", head)(folder)
    assert_same_tensors(hf, convert_to_hf(folder, tmp_path / "out", tokenizer=hf))
    _set("mp_rank_01_001", "output_layer.weight", head + 1)(folder)
    with pytest.raises(
        CheckpointError, match=r"output_layer\.weight is not embedding\.word_embeddings\.weight of .*_000"
    ):
        convert_to_hf(folder, tmp_path / "other", tokenizer=hf)


def test_a_head_of_its_own_is_not_lost_where_the_args_say_it_is_tied(tmp_path):
    hf = _write_model(tmp_path / "hf_model")
    _write_partitions(hf, tmp_path / "root", 1, 1, untie_embeddings_and_output_weights=False)
    with pytest.raises(CheckpointError, match=r"1 tensors that a Llama of 4 layers lacks, first output_layer\.weight"):
        convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf)


def test_norms_that_drifted_apart_are_those_of_the_first_rank_and_are_reported(tmp_path, caplog):
    hf = _write_model(tmp_path / "hf_model")
    folder = _write_partitions(hf, tmp_path / "root", 2, 1)
    with caplog.at_level(logging.WARNING):
        assert_same_tensors(hf, convert_to_hf(folder, tmp_path / "same", tokenizer=hf))
        assert "differ" not in caplog.text
        _apply("mp_rank_01", lambda content: content["model"]["decoder.final_layernorm.weight"].add_(0.25))(folder)
        assert_same_tensors(hf, convert_to_hf(folder, tmp_path / "out", tokenizer=hf))
    assert "1 norms differ from those of the first tensor-parallel rank, by up to 0.25" in caplog.text


def test_weights_that_are_views_of_one_buffer_are_read_at_their_place(tmp_path):
    hf = _write_model(tmp_path / "hf_model", dtype=torch.bfloat16)
    folder = _write_partitions(hf, tmp_path / "root", 2, 1)

    def flatten(content: dict) -> None:
        weights = {name: value for name, value in content["model"].items() if isinstance(value, torch.Tensor)}
        buffer = torch.cat([value.flatten() for value in weights.values()])
        views = zip(weights.items(), buffer.split([value.numel() for value in weights.values()]), strict=True)
        content["model"] = {name: view.view(value.shape) for (name, value), view in views}

    for rank in range(2):
        _change(folder, f"mp_rank_{rank:02d}", flatten)
    assert_same_tensors(hf, convert_to_hf(folder, tmp_path / "out", tokenizer=hf))


def test_without_args_the_config_beside_the_partitions_tells_the_model(tmp_path):
    hf = _write_model(tmp_path / "hf_model")
    folder = _write_partitions(hf, tmp_path / "root", 2, 2)
    for partition in folder.iterdir():
        _change(folder, partition.name, lambda content: content.pop("args"))
    with pytest.raises(CheckpointError, match=r"neither adapt\.json nor args of Megatron-LM tell"):
        convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf)
    shutil.copytree(hf, tmp_path / "root" / "hf")
    assert_same_tensors(hf, convert_to_hf(tmp_path / "root", tmp_path / "out"))


def _drop(name: str, tensor: str):
    return lambda folder: _change(folder, name, lambda content: content["model"].pop(tensor))


def _set(name: str, tensor: str, value: torch.Tensor):
    return lambda folder: _change(folder, name, lambda content: content["model"].update({tensor: value}))


def _nest(content: dict) -> None:
    content["model"] = {"language_model": {"embedding": {}}}


_QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


def _remove(*names: str):
    return lambda folder: [shutil.rmtree(folder / name) for name in names]


def _unlink(name: str):
    return lambda folder: (folder / name / "model_optim_rng.pt").unlink()


def _add(name: str):
    return lambda folder: (folder / name).mkdir()


def _replace(name: str, **values):
    return lambda folder: _change(folder, name, lambda content: content.update(values))


def _apply(name: str, change):
    return lambda folder: _change(folder, name, change)


def _split(content: dict) -> None:
    content.update(model0=content.pop("model"), model1={})


_FIRST, _LAST, _FC2 = "mp_rank_00_000", "mp_rank_01_001", "mlp.linear_fc2.weight"
_BIAS = "decoder.layers.0.self_attention.linear_proj.bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("mp_rank_01_000"), r"mp_rank_01_000/model_optim_rng\.pt missing, the others are of 2"),
        (_unlink("mp_rank_00_001"), r"mp_rank_00_001/model_optim_rng\.pt missing"),
        (_remove("mp_rank_01_000", _LAST), r"args\.tensor_model_parallel_size is 2, the partitions there are 1"),
        (_remove("mp_rank_00_001", _LAST), r"args\.pipeline_model_parallel_size is 2, the partitions there are 1"),
        (_add("mp_rank_02"), "holds mp_rank_00_000 and mp_rank_02, partitions of two runs"),
        (_add("mp_rank_00_000_001"), "mp_rank_00_000_001: a partition of experts"),
        (_replace(_LAST, iteration=20), rf"{_LAST}.*: of step 20, but .*{_FIRST}.* of step 10"),
        (_apply("mp_rank_01_000", _split), "2 model chunks, but .* has 1; the partitions are of two runs"),
        (_apply(_FIRST, _nest), r"layout before megatron-core \(language_model\)"),
        (_apply(_FIRST, lambda content: content.pop("model")), "holds no model, only args, checkpoint_version"),
        (_replace(_FIRST, checkpoint_version=2.0), r"checkpoint_version 2\.0 orders its tensors in another way"),
        (lambda f: torch.save([1], f / _FIRST / "model_optim_rng.pt"), "a list, not a partition of Megatron-LM"),
        (_drop("mp_rank_01_000", "embedding.word_embeddings.weight"), r"no tensor embedding\.word_embeddings\.weight"),
        (_drop(_LAST, _QKV), rf"{_LAST}.*: no tensor {_QKV}; the partition is incomplete"),
        (_set(_LAST, _QKV, torch.zeros(16, 32)), rf"{_QKV} has shape \(16, 32\), \(32, 32\) is the share of one of 2"),
        (_set("mp_rank_00_001", _BIAS, torch.zeros(32)), rf"1 tensors that a Llama of 4 layers lacks, first {_BIAS}"),
        (_set("mp_rank_00_001", f"decoder.layers.2.{_FC2}", torch.zeros(32, 24)), r"hold 2 \+ 3 layers, .* say 4"),
        (_set("mp_rank_00_001", f"decoder.layers.5.{_FC2}", torch.zeros(32, 24)), "layer 2 of its stage is missing"),
        (
            _set("mp_rank_00_001", _QKV, torch.zeros(32, 32)),
            r"stored as torch\.bfloat16 and torch\.float32; save .* one",
        ),
    ],
)
def test_partitions_that_do_not_fit_together_are_refused(tmp_path, damage, message):
    hf = _write_model(tmp_path / "hf_model", dtype=torch.bfloat16)
    folder = _write_partitions(hf, tmp_path / "root", 2, 2)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf)
    assert not (tmp_path / "out").exists()


def test_the_virtual_size_of_the_args_has_to_fit(tmp_path):
    hf = _write_model(tmp_path / "hf_model")
    _write_partitions(hf, tmp_path / "root", 1, 2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(CheckpointError, match=r"args\.virtual_pipeline_model_parallel_size is 2, .* are 1"):
        convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf)


def test_experts_in_the_args_are_refused_by_name_and_value(tmp_path):
    hf = _write_model(tmp_path / "hf_model")
    _write_partitions(hf, tmp_path / "root", 1, 1, num_experts=8)
    with pytest.raises(ConfigError, match=r"args\.num_experts 8 is not supported"):
        convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf)


def test_code_in_a_partition_does_not_run(tmp_path):
    hf = _write_model(tmp_path / "hf_model")
    folder = _write_partitions(hf, tmp_path / "root", 1, 1, evil=MakesFolder(tmp_path / "ran"))
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    assert b"mkdir" in path.read_bytes()
    assert_same_tensors(hf, convert_to_hf(folder, tmp_path / "out", tokenizer=hf))
    assert not (tmp_path / "ran").exists()


def test_partitions_are_found_as_a_root_and_as_an_iteration(tmp_path):
    hf = _write_model(tmp_path / "hf_model")
    folder = _write_partitions(hf, tmp_path / "root", 2, 1)
    assert find_checkpoint(tmp_path / "root") == folder == find_checkpoint(folder)
    assert is_megatron_checkpoint(tmp_path / "root")
    assert is_megatron_checkpoint(folder)
    with pytest.raises(ConfigError, match="is a Megatron checkpoint already; add --to hf"):
        convert_checkpoint(ConvertCheckpoint(source=folder, to="megatron", output=tmp_path / "out"))


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    hf = _write_model(tmp_path / "hf_model", intermediate_size=4096)
    _write_partitions(hf, tmp_path / "root", 2, 2)
    source, counted = open_checkpoint(tmp_path / "root", hf).source, []
    whole = source.read("decoder.layers.mlp.linear_fc2.weight")

    def count(descriptor, offset, spec, buffer=None):
        counted.append(spec.num_bytes)
        return read_values(descriptor, offset, spec, buffer)

    monkeypatch.setattr(saved, "read_values", count)
    box = source.read("decoder.layers.mlp.linear_fc2.weight", (3, 5, 0), (1, 2, 4096))
    assert torch.equal(box[0], whole[3, 5:7])
    assert counted == [2 * 2048 * 4] * 2  # two rows of each of two ranks, of 32 rows and 4 layers


def test_a_dry_run_checks_and_writes_nothing(tmp_path):
    hf = _write_model(tmp_path / "hf_model")
    folder = _write_partitions(hf, tmp_path / "root", 2, 2)
    before = sorted(tmp_path.iterdir())
    convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf, dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    _drop(_LAST, _QKV)(folder)
    with pytest.raises(CheckpointError, match="the partition is incomplete"):
        convert_to_hf(tmp_path / "root", tmp_path / "out", tokenizer=hf, dry_run=True)


def test_inspect_tells_how_the_model_was_cut(tmp_path):
    hf = _write_model(tmp_path / "hf_model")
    _write_partitions(hf, tmp_path / "root", 2, 2, 2)
    found = describe_megatron(tmp_path / "root")
    assert found["format"] == ("Megatron partitions (2 tensor-parallel ranks, 2 pipeline stages, 2 model chunks each)")
    assert (found["files"], found["model"]["num_layers"], found["vocabulary"]["rows"]) == (4, LAYERS, PADDED)
    assert found["position"]["step"] == 10
    tensors = {item["name"]: item for item in found["tensors"]}
    assert tensors["decoder.layers.*.mlp.linear_fc2.weight"]["count"] == 2 * LAYERS
    assert tensors["embedding.word_embeddings.weight"]["shape"] == [160, 32]

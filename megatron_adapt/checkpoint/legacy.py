"""Checkpoints in partitions: one ``model_optim_rng.pt`` for each tensor-parallel and pipeline rank.

Reads: the folders ``mp_rank_XX`` or ``mp_rank_XX_YYY`` (tensor rank, pipeline stage) of one iteration, with several
model chunks a file under an interleaved pipeline (``model0``, ``model1``, ...). Guarantees: partitions that do not fit
together are refused before a value is read; a tensor that no Llama has is refused, never left out; nothing in the files
is run (``saved``); memory of the rows that are asked for.

1. ``_find_partitions`` looks for gaps in the ranks, and for other kinds of partitions;
2. ``_read_partition`` reads the lists of tensors; ``_check_settings`` compares ranks, steps and chunks;
3. ``LegacyCheckpoint.assemble`` numbers the layers (the first chunk of all stages, then the second of all, ...) and
   says which rows or columns of a tensor each rank holds (``_place``): rows of queries, keys and values by groups of
   heads; gate and up rows as one half of each; columns of the two output projections; rows of the vocabulary; whole
   norms.

Source: Megatron-LM ``training/checkpointing.py`` (``get_checkpoint_name``, ``generate_state_dict``),
``tools/checkpoint/loader_base.py`` (order of chunks); megatron-core ``transformer/transformer_layer.py``
(``get_transformer_layer_offset``).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_adapt.checkpoint.assemble import AssembledSource, Part, ReadBox
from megatron_adapt.checkpoint.foreign import (
    EMBEDDING_KEY,
    LOCAL_NAMES,
    OUTPUT_KEY,
    describe_rule_shape,
    read_run,
    refuse_unknown,
    split_layer,
)
from megatron_adapt.checkpoint.layout import STACKED_PREFIX, TensorRule, list_rules
from megatron_adapt.checkpoint.root import PARTITION_PATTERN
from megatron_adapt.checkpoint.saved import SavedTensor, read_saved
from megatron_adapt.checkpoint.values import list_row_blocks
from megatron_adapt.errors import CheckpointError
from megatron_adapt.shape import LlamaShape

_logger = logging.getLogger(__name__)
PARTITION_FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")
_CHUNK = re.compile(r"model\d*")
_LAYER = re.compile(re.escape(STACKED_PREFIX) + r"(\d+)\.(.+)")
_COLUMNS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")

Tensors = Mapping[str, SavedTensor]


class _Place(NamedTuple):
    """A box of a layer of a tensor: where it begins, its shape, and where it begins in the tensor of the rank."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    inner: tuple[int, ...]


class _Partition(NamedTuple):
    """One file: its model chunks, and the plain values beside them."""

    path: Path
    chunks: list[Tensors]
    values: Mapping[str, Any]


class LegacyCheckpoint:
    """The partitions of one iteration.

    Raises:
        CheckpointError: a partition is missing, damaged, of another kind, or of another run than the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = _find_partitions(folder)
        self._differences: list[float] = []
        self._stages = [[_read_partition(path) for path in ranks] for ranks in paths]
        first = self._stages[0][0]
        self.arguments, self.step = read_run(first.values, str(first.path))
        self.tensor_size, self.num_stages = len(self._stages[0]), len(self._stages)
        _check_settings(self._stages, self.arguments)
        self.num_chunks = len(first.chunks)
        # Chunk 0 of all stages, then chunk 1 of all stages: the order of the layers. Each with one entry a tensor rank.
        self._chunks = [
            [_Partition(rank.path, [rank.chunks[chunk]], {}) for rank in stage]
            for chunk in range(self.num_chunks)
            for stage in self._stages
        ]
        embeddings = [rank.chunks[0].get(EMBEDDING_KEY) for rank in self._chunks[0]]
        if not all(embeddings):
            raise CheckpointError(
                f"{first.path}: no tensor {EMBEDDING_KEY}; this is no language model of megatron-core"
            )
        self.num_vocab_rows = sum(tensor.spec.shape[0] for tensor in embeddings if tensor)

    @property
    def partitions(self) -> list[tuple[Path, list[Tensors]]]:
        """Every file and its model chunks, as they are stored."""
        return [(rank.path, rank.chunks) for stage in self._stages for rank in stage]

    def assemble(self, shape: LlamaShape) -> AssembledSource:
        """Return the tensors of the model, merged over all ranks.

        Raises:
            CheckpointError: the layers do not add up, a tensor is missing or of a shape that does not fit, or one is
                there that no Llama has.
        """
        self._differences.clear()
        layers = self._number_layers(shape)
        tensors: dict[str, list[list[Part]]] = {}
        for rule in list_rules(shape):
            if rule.stacked:
                name = split_layer(rule)
                names = [name, *([LOCAL_NAMES[name]] if name in LOCAL_NAMES else [])]
                tensors[rule.megatron] = [
                    self._merge(rule, at, [f"{STACKED_PREFIX}{local}.{one}" for one in names], shape)
                    for at, local in layers
                ]
            else:
                at = 0 if rule.megatron == EMBEDDING_KEY else len(self._chunks) - 1
                tensors[rule.megatron] = [self._merge(rule, at, [rule.megatron], shape)]
        self._refuse_unknown(shape)
        if self._differences:
            _logger.warning(
                "%s: %d norms differ from those of the first tensor-parallel rank, by up to %.2g; the first is taken. "
                "Where that is much, the partitions are of two runs",
                self.folder, len(self._differences), max(self._differences),
            )  # fmt: skip
        return AssembledSource(self.folder, [path for path, _ in self.partitions], tensors)

    def _number_layers(self, shape: LlamaShape) -> list[tuple[int, int]]:
        """Return chunk and local number of every layer."""
        counts = [_count_layers(ranks[0]) for ranks in self._chunks]
        if sum(counts) != shape.num_layers:
            raise CheckpointError(
                f"{self.folder}: its {self.num_stages} pipeline stages hold {' + '.join(map(str, counts))} layers, the "
                f"settings of the run say {shape.num_layers}; a stage is of another run, fetch it again"
            )
        return [(at, local) for at, count in enumerate(counts) for local in range(count)]

    def _merge(self, rule: TensorRule, at: int, names: Sequence[str], shape: LlamaShape) -> list[Part]:
        """Return the parts of one layer of a tensor."""
        parts: list[Part] = []
        whole = describe_rule_shape(rule, shape, self.num_vocab_rows)
        for rank, partition in enumerate(self._chunks[at]):
            tensor = next((partition.chunks[0][name] for name in names if name in partition.chunks[0]), None)
            if tensor is None:
                raise CheckpointError(
                    f"{partition.path}: no tensor {' or '.join(names)}; the partition is incomplete, fetch it again"
                )
            places = _place(rule, whole, rank, self.tensor_size)
            ends = [[begin + size for begin, size in zip(place.inner, place.sizes, strict=True)] for place in places]
            expected = tuple(map(max, zip(*ends, strict=True)))
            if any(size % self.tensor_size for size in _cut_sizes(rule, shape)) or tensor.spec.shape != expected:
                raise CheckpointError(
                    f"{partition.path}: {names[0]} has shape {tensor.spec.shape}, {expected} is the share of one of "
                    f"{self.tensor_size} tensor-parallel ranks; the partitions do not belong together, fetch them again"
                )
            if rank and not _is_cut(rule):
                self._compare_ranks(parts[0].read, tensor)
            else:
                parts += [Part(*place, tensor.spec.dtype, tensor.read) for place in places]
        return parts

    def _compare_ranks(self, read_first: ReadBox, tensor: SavedTensor) -> None:
        """Note how far a norm lies from that of rank 0, which is taken; they may drift apart in a long run."""
        size, zeros = tensor.spec.shape, (0,) * len(tensor.spec.shape)
        difference = (read_first(zeros, size, None).double() - tensor.read(zeros, size).double()).abs().max().item()
        if difference:
            self._differences.append(difference)

    def _refuse_unknown(self, shape: LlamaShape) -> None:
        inner = {split_layer(rule) for rule in list_rules(shape) if rule.stacked}
        inner |= {LOCAL_NAMES[name] for name in inner & LOCAL_NAMES.keys()}
        known = {rule.megatron for rule in list_rules(shape) if not rule.stacked}
        if shape.tied and self.num_stages > 1:
            self._compare_heads()
            known.add(OUTPUT_KEY)
        for ranks in self._chunks:
            for partition in ranks:
                names = partition.chunks[0]
                layered = {name for name in names if (found := _LAYER.fullmatch(name)) and found[2] in inner}
                refuse_unknown(names, known | layered, shape, str(partition.path))

    def _compare_heads(self) -> None:
        """Refuse a tied model whose last stage holds another head than the embedding of the first.

        Where head and embedding are the same matrix, the last of several stages has a copy of it.
        """
        for first, last in zip(self._chunks[0], self._chunks[-1], strict=True):
            embedding, head = first.chunks[0][EMBEDDING_KEY], last.chunks[0].get(OUTPUT_KEY)
            if head is None:
                continue
            zeros = [0] * (len(head.spec.shape) - 1)
            same = head.spec == embedding.spec and all(
                torch.equal(*(one.read((a, *zeros), (b - a, *head.spec.shape[1:])).view(torch.uint8) for one in pair))
                for pair in [(embedding, head)]
                for a, b in list_row_blocks(head.spec)
            )
            if not same:
                raise CheckpointError(
                    f"{last.path}: {OUTPUT_KEY} is not {EMBEDDING_KEY} of {first.path}, though the settings of the run "
                    "say that the model ties them; the partitions do not belong together, fetch them again"
                )


def _find_partitions(folder: Path) -> list[list[Path]]:
    """Return the files by pipeline stage and tensor rank."""
    found: dict[tuple[int, int], Path] = {}
    names = sorted(path.name for path in folder.glob(PARTITION_PATTERN))
    staged = {name: match[2] is not None for name in names if (match := _FOLDER.fullmatch(name))}
    for name in names:
        match = _FOLDER.fullmatch(name)
        if match is None or match[3]:
            raise CheckpointError(f"{folder / name}: a partition of experts; models with experts are not supported")
        if staged[name] != staged[names[0]]:
            raise CheckpointError(
                f"{folder}: holds {names[0]} and {name}, partitions of two runs; leave those of one there"
            )
        found[int(match[2] or 0), int(match[1])] = folder / name / PARTITION_FILE
    stages, ranks = (max(place[axis] for place in found) + 1 for axis in (0, 1))
    for stage in range(stages):
        for rank in range(ranks):
            if (stage, rank) not in found or not found[stage, rank].is_file():
                name = f"mp_rank_{rank:02d}_{stage:03d}" if staged[names[0]] else f"mp_rank_{rank:02d}"
                raise CheckpointError(
                    f"{folder}: {name}/{PARTITION_FILE} missing, the others are of {ranks} tensor-parallel ranks and "
                    f"{stages} pipeline stages; fetch it"
                )
    return [[found[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _read_partition(path: Path) -> _Partition:
    content = read_saved(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a {type(content).__name__}, not a partition of Megatron-LM; check the path")
    chunks: list[Tensors] = []
    for key in sorted((key for key in content if isinstance(key, str) and _CHUNK.fullmatch(key)), key=_sort_chunk):
        chunk = content[key]
        if not isinstance(chunk, dict) or "language_model" in chunk:
            raise CheckpointError(
                f"{path}: {key} is in the layout before megatron-core (language_model); load it with its own "
                "Megatron-LM and save it with --use-mcore-models"
            )
        chunks.append({name: value for name, value in chunk.items() if isinstance(value, SavedTensor)})
    if not chunks:
        raise CheckpointError(f"{path}: holds no model, only {', '.join(map(str, content))}; check the path")
    return _Partition(path, chunks, content)


def _sort_chunk(key: str) -> int:
    return int(key.removeprefix("model") or 0)


def _check_settings(stages: Sequence[Sequence[_Partition]], arguments: Mapping[str, Any] | None) -> None:
    """Refuse partitions that cannot be of one run."""
    first = stages[0][0]
    _, first_step = read_run(first.values, str(first.path))
    for rank in (rank for stage in stages for rank in stage):
        _, step = read_run(rank.values, str(rank.path))
        if step != first_step:
            raise CheckpointError(
                f"{rank.path}: of step {step}, but {first.path} of step {first_step}; fetch the partitions of one step"
            )
        if len(rank.chunks) != len(first.chunks):
            raise CheckpointError(
                f"{rank.path}: {len(rank.chunks)} model chunks, but {first.path} has {len(first.chunks)}; the "
                "partitions are of two runs"
            )
    if arguments is None:
        return
    counted = {
        "tensor_model_parallel_size": len(stages[0]),
        "pipeline_model_parallel_size": len(stages),
        "virtual_pipeline_model_parallel_size": len(first.chunks),
    }
    for name, count in counted.items():
        said = arguments.get(name) or (1 if name.startswith("virtual") else count)
        if said != count:
            raise CheckpointError(
                f"{first.path.parent.parent}: args.{name} is {said!r}, the partitions there are {count}; fetch all of "
                "them"
            )


def _count_layers(partition: _Partition) -> int:
    numbers = {int(found[1]) for name in partition.chunks[0] if (found := _LAYER.fullmatch(name))}
    if numbers != set(range(len(numbers))):
        gap = min(set(range(len(numbers))) - numbers)
        raise CheckpointError(f"{partition.path}: layer {gap} of its stage is missing; fetch the partition again")
    return len(numbers)


def _is_cut(rule: TensorRule) -> bool:
    """Tell whether ranks share a tensor; each of them has all of the others."""
    return rule.kind != "copy" or split_layer(rule) in _COLUMNS


def _cut_sizes(rule: TensorRule, shape: LlamaShape) -> list[int]:
    """Return the sizes that the number of ranks must divide."""
    if rule.kind == "qkv":
        return [shape.num_query_groups]
    if rule.kind == "gate_up":
        return [shape.ffn_hidden_size]
    return []


def _place(rule: TensorRule, whole: tuple[int, ...], rank: int, num_ranks: int) -> list[_Place]:
    """Return the boxes of a layer that a rank holds."""
    zeros = (0,) * len(whole)
    if not _is_cut(rule):
        return [_Place(zeros, whole, zeros)]
    if split_layer(rule) in _COLUMNS:
        width = whole[1] // num_ranks
        return [_Place((0, rank * width), (whole[0], width), zeros)]
    halves = 2 if rule.kind == "gate_up" else 1
    rows = whole[0] // halves // num_ranks
    return [
        _Place((half * (whole[0] // halves) + rank * rows, *zeros[1:]), (rows, *whole[1:]), (half * rows, *zeros[1:]))
        for half in range(halves)
    ]

"""``torch_dist`` folders that megatron-core wrote for another program, under the names of ``layout``.

Reads: ``.metadata``, the ``.distcp`` files and ``common.pt``. Guarantees: a tensor that no Llama has stops the reading,
it is never left out silently; quantisation states (``_extra_state``), optimizer and random states are passed over
unread.

Names that megatron-core has given to the same tensor, all of them known here:

- layers stacked on a leading axis, or one key a layer (``decoder.layers.0.``: layers that may differ);
- norms inside the fused layers of Transformer Engine, or beside the local ones (``LOCAL_NAMES``);
- gate and up rows in one tensor, or as ``weight_w`` and ``weight_v`` (local shards saved on their own).

Source: megatron-core 0.16 ``transformer/transformer_block.py`` (``sharded_state_dict``), ``transformer/mlp.py``
(``apply_swiglu_sharded_factory``), ``models/gpt/gpt_layer_specs.py``; Megatron-LM ``training/checkpointing.py``.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_adapt.checkpoint.assemble import AssembledSource, Part
from megatron_adapt.checkpoint.dist import COMMON_FILE, DistReader
from megatron_adapt.checkpoint.layout import STACKED_PREFIX, TensorRule, list_rules, shape_megatron
from megatron_adapt.checkpoint.saved import Arguments, read_saved
from megatron_adapt.errors import CheckpointError
from megatron_adapt.shape import LlamaShape

EMBEDDING_KEY, OUTPUT_KEY = "embedding.word_embeddings.weight", "output_layer.weight"
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"Names of the norms inside a layer: Transformer Engine's to those of megatron-core's local layers."
_MODEL_PREFIXES = ("embedding.", "decoder.", "encoder.", "mtp.", "output_layer.", "rotary_pos_emb.")
_REDUNDANT = ("_extra_state", "rotary_pos_emb.inv_freq")


class ForeignCheckpoint(Protocol):
    """A checkpoint that does not describe itself.

    Attributes:
        folder: where it lies.
        arguments: settings of the run that wrote it, by name; None when it kept none.
        step: training steps done.
        num_vocab_rows: rows of the embedding matrix.
    """

    folder: Path
    arguments: Mapping[str, Any] | None
    step: int
    num_vocab_rows: int

    def assemble(self, shape: LlamaShape) -> AssembledSource:
        """Return its tensors, once the model is known."""


def split_layer(rule: TensorRule) -> str:
    """Return the name of a stacked tensor within its layer."""
    return rule.megatron.removeprefix(STACKED_PREFIX)


def refuse_unknown(names: Iterable[str], known: set[str], shape: LlamaShape, where: str) -> None:
    """Refuse tensors of the model that a Llama does not have.

    Raises:
        CheckpointError: with the first of them.
    """
    unknown = [
        name
        for name in names
        if name.startswith(_MODEL_PREFIXES) and name not in known and not any(word in name for word in _REDUNDANT)
    ]
    if unknown:
        raise CheckpointError(
            f"{where}: {len(unknown)} tensors that a Llama of {shape.num_layers} layers lacks, first {unknown[0]}; "
            "this model is not supported"
        )


class DistCheckpoint:
    """A ``torch_dist`` folder of another program.

    Raises:
        CheckpointError: the folder or ``common.pt`` is damaged, or there is no embedding matrix.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = DistReader(folder)
        common = read_saved(folder / COMMON_FILE) if (folder / COMMON_FILE).is_file() else {}
        common = common if isinstance(common, dict) else {}
        self.arguments, self.step = read_run(common, str(folder))
        rows = self.reader.shape(EMBEDDING_KEY)
        if not rows:
            named = [key for key in self.reader.keys if key.endswith(EMBEDDING_KEY)]
            raise CheckpointError(
                f"{folder}: no tensor {EMBEDDING_KEY}{f', only {named[0]}' if named else ''}; this is no torch_dist "
                "checkpoint of a language model that Megatron-LM saved"
            )
        self.num_vocab_rows = rows[0]

    def assemble(self, shape: LlamaShape) -> AssembledSource:
        """Return the tensors of the model.

        Raises:
            CheckpointError: one is missing, or one is there that no Llama has.
        """
        known: set[str] = set()
        tensors: dict[str, list[list[Part]]] = {}
        for rule in list_rules(shape):
            if rule.stacked:
                tensors[rule.megatron] = [
                    self._find_layer(rule, layer, shape, known) for layer in range(shape.num_layers)
                ]
            elif self.reader.shape(rule.megatron) is not None:
                tensors[rule.megatron] = [[self._part(rule.megatron, None, known)]]
        missing = [rule.megatron for rule in list_rules(shape) if rule.megatron not in tensors]
        if missing:
            raise CheckpointError(
                f"{self.folder}: no tensor {missing[0]}; the checkpoint is incomplete, fetch it again"
            )
        refuse_unknown(self.reader.keys, known, shape, str(self.folder))
        return AssembledSource(self.folder, self.reader.files, tensors)

    def _find_layer(self, rule: TensorRule, layer: int, shape: LlamaShape, known: set[str]) -> list[Part]:
        """Return the parts of one layer, under whichever names they are stored."""
        name = split_layer(rule)
        names = [name, *([LOCAL_NAMES[name]] if name in LOCAL_NAMES else [])]
        for one in names:
            stacked, own = f"{STACKED_PREFIX}{one}", f"{STACKED_PREFIX}{layer}.{one}"
            found = self.reader.shape(stacked)
            if found is not None:
                self._check_depth(stacked, found[0], shape)
                return [self._part(stacked, layer, known)]
            if self.reader.shape(own) is not None:
                return [self._part(own, None, known)]
        if rule.kind == "gate_up":
            for front, depth in ((STACKED_PREFIX, layer), (f"{STACKED_PREFIX}{layer}.", None)):
                halves = [f"{front}{name}_{half}" for half in "wv"]
                if all(self.reader.shape(half) is not None for half in halves):
                    gate = self._part(halves[0], depth, known)
                    return [gate, self._part(halves[1], depth, known, first_row=gate.sizes[0])]
        raise CheckpointError(
            f"{self.folder}: no tensor {' or '.join(names)} of layer {layer}; the checkpoint is incomplete or another "
            "model, fetch it again"
        )

    def _check_depth(self, key: str, num_layers: int, shape: LlamaShape) -> None:
        if num_layers != shape.num_layers:
            raise CheckpointError(
                f"{self.folder}: {key} has {num_layers} layers, the settings of the run say {shape.num_layers}; they "
                "do not belong together"
            )

    def _part(self, key: str, layer: int | None, known: set[str], first_row: int = 0) -> Part:
        known.add(key)
        size = self.reader.shape(key)
        assert size, key
        size = size if layer is None else size[1:]
        zeros = (0,) * len(size)
        read = partial(_read_dist, self.reader, key, layer)
        return Part((first_row, *zeros[1:]), size, zeros, self.reader.dtype(key), read)


def _read_dist(
    reader: DistReader, key: str, layer: int | None, offsets: Any, sizes: Any, buffer: torch.Tensor | None
) -> torch.Tensor:
    if layer is None:
        return reader.read(key, offsets, sizes, buffer)
    return reader.read(key, (layer, *offsets), (1, *sizes), buffer)[0]


def read_run(common: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any] | None, int]:
    """Return settings and step of the run that wrote a checkpoint, out of its plain values.

    Raises:
        CheckpointError: the checkpoint is older than the present order of query, key and value rows.
    """
    version = common.get("checkpoint_version", 3.0)
    if not isinstance(version, int | float) or version < 3:
        raise CheckpointError(
            f"{where}: checkpoint_version {version!r} orders its tensors in another way; load it with its own "
            "Megatron-LM and save it again"
        )
    args, step = common.get("args"), common.get("iteration", 0)
    return vars(args) if isinstance(args, Arguments) else None, step if isinstance(step, int) else 0


def describe_rule_shape(rule: TensorRule, shape: LlamaShape, padded_vocab_size: int) -> tuple[int, ...]:
    """Return the shape of one layer of a tensor."""
    size = shape_megatron(rule, shape, padded_vocab_size)
    return size[1:] if rule.stacked else size

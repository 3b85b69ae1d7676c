"""Token distillation: input rows of new tokens that do to the model what the old pieces of the tokens do.

The teacher is the same model. It reads a window with every new token replaced by the old pieces that spell it
(``added_pieces.json``); none of its rows learns, so it never changes. The student reads the window as it is. The loss
of a position is the mean squared difference of the two hidden states, the teacher's taken at the last piece of the
token. It counts at all positions from the first new token of a document on: what comes before is the same for both.

Each window is a context of every new token in it; no file is read besides the token files.

1. ``spell_new_tokens``: the pieces of every id, as ids of the same vocabulary.
2. ``expand_windows``: the teacher's windows, and where in them the student's tokens end.
3. ``find_positions``: which positions count.
4. ``compare_hidden_states``: both passes and the loss.

Costs: a forward pass over the old pieces, then a forward and a backward pass over the window; no head.
Source: Dobler, Elliott and de Melo 2025 (arXiv 2505.20133); there on snippets of a corpus around each token.
Shapes: B windows, T positions of the student, S of the teacher, V vocabulary, H hidden.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.engine.attention import pack_documents
from megatron_adapt.engine.llama import LlamaModel
from megatron_adapt.engine.parallel import get_device
from megatron_adapt.errors import ConfigError
from megatron_adapt.shape import LlamaShape
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.train.documents import find_documents
from megatron_adapt.train.new_tokens import read_new_tokens

_LENGTH_MULTIPLE = 64
"Teacher's windows are padded to it, so that there are few lengths to prepare kernels and rotary tables for."


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What turns a window of the student into one of the teacher."""

    starts_V: NDArray[np.int64]
    "Where the pieces of an id begin in ``pieces``."
    counts_V: NDArray[np.int64]
    "How many they are; an id that is not new has one, itself."
    pieces: NDArray[np.int64]
    "The pieces of all ids, one id after another."
    is_new_V: NDArray[np.bool_]
    "Whether an id is spelt by others."
    layer: int
    "Layer whose hidden states are compared; -1 is the last, behind the final norm."
    max_positions: int
    "Positions that the model knows; what the teacher would read beyond them is left out."


def plan_distillation(
    stage: StageSettings, train: TrainSettings, shape: LlamaShape, tokenizer: Path
) -> Distillation | None:
    """Return what a stage of token distillation needs; None for another stage.

    Raises:
        ConfigError: the layers are split over ranks, there is no such layer, or a new token is spelt by an old one
            that the vocabulary has no more.
        DataError: the map of new tokens is damaged.
    """
    if stage.objective != "token_distillation":
        return None
    where = f"train.stages {stage.name}: token_distillation"
    if train.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"{where}: does not run at pipeline_model_parallel_size {train.pipeline_model_parallel_size}; launch this "
            "stage with 1 and split the matrices (tensor_model_parallel_size) instead"
        )
    if train.context_parallel_size > 1:
        raise ConfigError(
            f"{where}: does not run at context_parallel_size {train.context_parallel_size}, its two readings of a "
            "window differ in length; use 1"
        )
    if stage.distillation_layer > shape.num_layers:
        raise ConfigError(
            f"{where}: the model has {shape.num_layers} layers, distillation_layer is {stage.distillation_layer}; use "
            "-1 for the last"
        )
    return spell_new_tokens(
        read_new_tokens(stage, tokenizer),
        layer=stage.distillation_layer,
        max_positions=shape.max_position_embeddings,
        where=where,
    )


def spell_new_tokens(id_map: IdMap, *, layer: int, max_positions: int, where: str = "") -> Distillation:
    """Find the pieces of every id, as ids of the new vocabulary.

    Raises:
        ConfigError: a piece is no token of the new vocabulary.
    """
    now = {id_map.old_id(index): index for index in reversed(range(id_map.vocab_size))}
    lost = {new: [old for old in olds if old not in now] for new, olds in id_map.pieces.items()}
    num_lost, example = sum(map(bool, lost.values())), next((new for new, olds in lost.items() if olds), None)
    if example is not None:
        raise ConfigError(
            f"{where}: {num_lost} of {len(lost)} new tokens are spelt by old tokens that the new tokenizer dropped "
            f"(token {example}: old id {lost[example][0]}), so the model cannot read them; fill their rows by a method "
            "of tools/resize_vocab.py alone"
        )
    spelt = [[now[old] for old in id_map.pieces.get(index, ())] or [index] for index in range(id_map.vocab_size)]
    counts_V = np.array([len(pieces) for pieces in spelt], dtype=np.int64)
    return Distillation(
        starts_V=np.cumsum(counts_V) - counts_V,
        counts_V=counts_V,
        pieces=np.concatenate([np.array(pieces, dtype=np.int64) for pieces in spelt]),
        is_new_V=np.array([bool(id_map.pieces.get(index)) for index in range(id_map.vocab_size)]),
        layer=layer,
        max_positions=max_positions,
    )


def expand_windows(
    distillation: Distillation, ids_BT: NDArray[np.int64], *, padding_id: int = 0, multiple: int = _LENGTH_MULTIPLE
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Replace new tokens by their pieces.

    Args:
        distillation: the pieces of every id.
        ids_BT: windows of the student.
        padding_id: what stands behind the end of a window; attention is causal, so nothing sees it.
        multiple: of which the length of the teacher's windows is one.

    Returns:
        The teacher's windows [B, S], cut at ``max_positions``, and for each token of the student the place of its last
        piece [B, T], which may lie beyond the cut.
    """
    counts_BT = distillation.counts_V[ids_BT]
    ends_BT = counts_BT.cumsum(axis=1)
    length = min(int(ends_BT[:, -1].max()), distillation.max_positions)
    expanded_BS = np.full((len(ids_BT), math.ceil(length / multiple) * multiple), padding_id, dtype=np.int64)
    for row, (ids, counts, ends) in enumerate(zip(ids_BT, counts_BT, ends_BT, strict=True)):
        shifts = np.repeat(distillation.starts_V[ids] - (ends - counts), counts)
        pieces = distillation.pieces[shifts + np.arange(len(shifts))][:length]
        expanded_BS[row, : len(pieces)] = pieces
    return expanded_BS, ends_BT - 1


def find_positions(distillation: Distillation, ids_BT: NDArray[np.int64], reset_at: int | None) -> NDArray[np.bool_]:
    """Return which positions see a new token: those from the first one of their document on.

    Args:
        distillation: which ids are new.
        ids_BT: windows of the student.
        reset_at: end-of-document id behind which attention starts anew; None where it spans documents.
    """
    places_T = np.arange(ids_BT.shape[1])
    last_new_BT = np.maximum.accumulate(np.where(distillation.is_new_V[ids_BT], places_T, -1), axis=1)
    begins_BT = np.zeros_like(ids_BT)
    if reset_at is not None:
        begins_BT[:, 1:] = np.where(ids_BT[:, :-1] == reset_at, places_T[1:], 0)
    sees_new_BT: NDArray[np.bool_] = last_new_BT >= np.maximum.accumulate(begins_BT, axis=1)
    return sees_new_BT


def compare_hidden_states(
    distillation: Distillation, model: LlamaModel, ids_BT: NDArray[np.int64], reset_at: int | None
) -> tuple[torch.Tensor, NDArray[np.bool_], NDArray[np.bool_]]:
    """Read windows as teacher and as student.

    Args:
        distillation: what turns the one into the other.
        model: the model of this rank, which holds all layers.
        ids_BT: windows of the student.
        reset_at: end-of-document id behind which attention starts anew; None where it spans documents.

    Returns:
        [B, T] mean squared differences in fp32; which positions count; which would, but for the teacher's last piece
        that lies beyond the positions of the model.
    """
    # Padding that ended documents would be a document each.
    padding_id = int(reset_at == 0)
    multiple = math.lcm(_LENGTH_MULTIPLE, parallel_state.get_tensor_model_parallel_world_size())
    expanded_BS, last_BT = expand_windows(distillation, ids_BT, padding_id=padding_id, multiple=multiple)
    sees_new_BT, is_inside_BT = find_positions(distillation, ids_BT, reset_at), last_BT < distillation.max_positions
    with torch.no_grad():
        states_SBH = _compute_states(model, expanded_BS, distillation.layer, reset_at)
    index_TB = torch.from_numpy(np.minimum(last_BT, expanded_BS.shape[1] - 1)).T.to(states_SBH.device)
    target_TBH = states_SBH.float().take_along_dim(index_TB[..., None], dim=0)
    found_TBH = _compute_states(model, ids_BT, distillation.layer, reset_at)
    loss_TB = (found_TBH.float() - target_TBH).square().mean(-1)
    return loss_TB.T.contiguous(), sees_new_BT & is_inside_BT, sees_new_BT & ~is_inside_BT


def _compute_states(model: LlamaModel, ids_BT: NDArray[np.int64], layer: int, reset_at: int | None) -> torch.Tensor:
    """Return the hidden states [T, B, H] of windows."""
    documents = None
    if reset_at is not None:
        documents = pack_documents(torch.from_numpy(find_documents(ids_BT, reset_at)), ids_BT.shape[1])
    return model.compute_hidden_states(torch.from_numpy(ids_BT).to(get_device()), layer, documents)

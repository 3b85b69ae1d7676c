"""Compare a Hugging Face folder with a Megatron checkpoint: every tensor by bytes, and logits on random tokens.

``compare_tensors`` goes through the slices of ``slices`` again. ``compare_logits`` runs transformers'
``LlamaForCausalLM`` and the engine's model, both in fp32 whatever the type of the weights, so that one tolerance
serves all types; where the two sides store different types, both are rounded to the narrower one first.

Cost: ``compare_tensors`` reads both sides once, ``compare_logits`` holds two fp32 copies of the model.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from megatron_adapt.checkpoint.assemble import Source
from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.checkpoint.layout import EMBEDDING, list_rules
from megatron_adapt.checkpoint.opened import OpenedCheckpoint
from megatron_adapt.checkpoint.root import Description, find_checkpoint, read_description
from megatron_adapt.checkpoint.slices import Slice, list_slices, run_steps
from megatron_adapt.checkpoint.values import bytes_of, torch_dtype
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import Layout
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import get_device, start_engine
from megatron_adapt.errors import CheckpointError

_logger = logging.getLogger(__name__)
_NUM_TOKENS = 256
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """How far the logits of the two sides lie apart.

    Attributes:
        num_tokens: positions compared, each over the true vocabulary.
        max_difference: largest absolute difference.
        mean_difference: mean absolute difference.
        top1_agreement: share of positions where both sides rank the same token first.
        tolerance: largest difference that counts as equal: 1e-4, times the spread (standard deviation) of the
            logits where that is above 1.
    """

    num_tokens: int
    max_difference: float
    mean_difference: float
    top1_agreement: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the largest difference is within the tolerance."""
        return self.max_difference <= self.tolerance

    def describe(self) -> str:
        """Return the comparison as one line."""
        return (
            f"logits on {self.num_tokens} random tokens: max |d| {self.max_difference:.2e} "
            f"(tolerance {self.tolerance:.0e}), mean |d| {self.mean_difference:.2e}, "
            f"top-1 agreement {self.top1_agreement:.2%}"
        )


def verify_conversion(
    hf_folder: Path,
    megatron: Path | OpenedCheckpoint,
    *,
    output: Literal["megatron", "hf"],
    logits: bool = True,
) -> None:
    """Compare tensors and logits, log both results and stop at a difference.

    Args:
        hf_folder: one side.
        megatron: the other: a root or a ``torch_dist`` folder, or a checkpoint of any origin that is open.
        output: the side that was converted from the other; a change of type happened on the way to it.
        logits: compare logits too, which takes two fp32 copies of the model in memory.

    Raises:
        CheckpointError: the two sides differ.
    """
    count = compare_tensors(hf_folder, megatron, output=output)
    _logger.info("verified: %d tensors are equal byte by byte", count)
    if isinstance(megatron, OpenedCheckpoint) and not megatron.is_own:
        _logger.info("logits not compared: the engine does not load a checkpoint of another program")
        return
    megatron_folder = megatron.folder if isinstance(megatron, OpenedCheckpoint) else megatron
    if not logits:
        _logger.info("logits not compared: the model is larger than checkpoint.verify_logits_parameters")
        return
    comparison = compare_logits(hf_folder, megatron_folder)
    _logger.info("verified: %s", comparison.describe())
    if not comparison.agrees:
        raise CheckpointError(
            f"{megatron_folder}: {comparison.describe()}; the conversion is wrong for this model, please report it"
        )


def compare_tensors(
    hf_folder: Path, megatron_checkpoint: Path | OpenedCheckpoint, *, output: Literal["megatron", "hf"]
) -> int:
    """Compare every tensor of two checkpoints by bytes and return how many there are.

    Padding rows of the Megatron side have no counterpart; they must be finite and not zero.

    Args:
        hf_folder: Hugging Face folder.
        megatron_checkpoint: root or ``torch_dist`` folder, or a checkpoint of any origin that is open.
        output: the side that was converted; the other side is cast to its type before comparing.

    Raises:
        CheckpointError: a tensor differs.
    """
    hf = HFFolder(hf_folder)
    if isinstance(megatron_checkpoint, OpenedCheckpoint):
        description, megatron = megatron_checkpoint.description, megatron_checkpoint.source
    else:
        iter_folder = find_checkpoint(megatron_checkpoint)
        description, megatron = read_description(iter_folder), DistReader(iter_folder)
    shape = description.shape
    itemsizes = {rule.megatron: megatron.dtype(rule.megatron).itemsize for rule in list_rules(shape)}
    slices = list_slices(shape, itemsizes)

    def compare_slice(item: Slice, buffer: torch.Tensor) -> int:
        left = hf.read_rows(item.hf, item.hf_row, item.hf_row + item.num_rows, buffer)
        right = megatron.read(item.key, *item.place(tuple(left.shape[1:]))).reshape(left.shape)
        _compare(item.hf, left, right, output)
        return right.nbytes

    run_steps(slices, compare_slice)
    if output == "megatron":
        for rule in list_rules(shape):
            if rule.kind == "vocab":
                _check_padding(megatron, rule.megatron, description)
    return len({item.hf for item in slices})


def _check_padding(megatron: Source, key: str, description: Description) -> None:
    true_size, num_rows = description.true_vocab_size, description.padded_vocab_size
    padding = megatron.read(key, (true_size, 0), (num_rows - true_size, description.shape.hidden_size))
    if not (padding.isfinite().all() and padding.any(-1).all()):
        raise CheckpointError(f"{megatron.folder}: padding rows of {key} are zero or not finite")


def _compare(name: str, hf: torch.Tensor, megatron: torch.Tensor, output: Literal["megatron", "hf"]) -> None:
    left, right = (hf, megatron.to(hf.dtype)) if output == "hf" else (hf.to(megatron.dtype), megatron)
    if bytes_of(left.contiguous()) != bytes_of(right.contiguous()):
        raise CheckpointError(f"{name}: differs between the two checkpoints; the conversion is wrong, do not use it")


def compare_logits(hf_folder: Path, megatron_folder: Path) -> LogitComparison:
    """Run both models on the same random tokens, in fp32.

    Args:
        hf_folder: Hugging Face folder.
        megatron_folder: root or ``torch_dist`` folder.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    iter_folder = find_checkpoint(megatron_folder)
    description = read_description(iter_folder)
    length = min(_NUM_TOKENS, description.shape.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(description.true_vocab_size, (1, length), generator=generator)
    types = (HFFolder(hf_folder).dtype(EMBEDDING), torch_dtype(description.dtype))
    ours_TV = _run_megatron(iter_folder, description, ids_BT, types)
    theirs_TV = _run_hf(hf_folder, ids_BT, types)
    difference_TV = (ours_TV - theirs_TV).abs()
    agreement = (ours_TV.argmax(-1) == theirs_TV.argmax(-1)).double().mean()
    return LogitComparison(
        num_tokens=length,
        max_difference=difference_TV.max().item(),
        mean_difference=difference_TV.mean().item(),
        top1_agreement=agreement.item(),
        tolerance=_TOLERANCE * max(1.0, theirs_TV.std().item()),
    )


@torch.no_grad()
def _run_hf(folder: Path, ids_BT: torch.Tensor, types: tuple[torch.dtype, ...]) -> torch.Tensor:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _round(model, types)
    logits_BTV: torch.Tensor = model.eval()(ids_BT).logits
    return logits_BTV[0].float()


@torch.no_grad()
def _run_megatron(
    iter_folder: Path, description: Description, ids_BT: torch.Tensor, types: tuple[torch.dtype, ...]
) -> torch.Tensor:
    layout, device = Layout(), None
    with start_engine(layout, seed=0):
        device = get_device()
        model = build_model(
            description.shape,
            padded_vocab_size=description.padded_vocab_size,
            layout=layout,
            seq_length=ids_BT.shape[1],
            bf16=False,
        )
        load_weights([model], iter_folder)
        _round(model, types)
        positions_BT = torch.arange(ids_BT.shape[1])[None]
        logits_BTV: torch.Tensor = model.eval()(ids_BT.to(device), positions_BT.to(device), None)
        return logits_BTV[0, :, : description.true_vocab_size].float().cpu()


def _round(model: torch.nn.Module, types: tuple[torch.dtype, ...]) -> None:
    """Round fp32 parameters to each of the types in turn."""
    for parameter in model.parameters():
        for dtype in types:
            parameter.copy_(parameter.to(dtype))

"""The same Llama in a plain transformers loop and in ours: one function each that does a training step.

``make_weights`` draws one model and writes it as a Hugging Face folder and as a Megatron checkpoint; both sides read
their weights from there and run where the engine runs, on a GPU or on the CPU.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint, Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import build_chunks
from megatron_adapt.engine.parallel import get_device
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import train_step

LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1


def make_weights(
    folder: Path, config: Mapping[str, int], seq_length: int, dtype: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """Draw a model with tied matrices; return its Hugging Face folder and its Megatron checkpoint."""
    torch.manual_seed(0)
    hf, megatron = folder / "hf", folder / "megatron"
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, max_position_embeddings=seq_length, **config))
    model.to(dtype).save_pretrained(hf)
    convert_checkpoint(ConvertCheckpoint(source=hf, to="megatron", output=megatron, settings=CheckpointSettings()))
    return hf, find_checkpoint(megatron)


def load_peer(hf: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """Load what transformers trains, with SDPA."""
    model = LlamaForCausalLM.from_pretrained(hf, dtype=dtype, attn_implementation="sdpa")
    model.to(get_device()).train()
    return model


def make_peer(model: Any, windows: np.ndarray, *, autocasts: bool = False, updates: bool = True) -> Callable[[], float]:
    """Return a function that does one step of a plain loop and returns the loss.

    Args:
        model: of ``load_peer``, compiled or not.
        windows: [B, T + 1] token ids.
        autocasts: compute in bf16 over fp32 weights.
        updates: clip gradients and step ``torch.optim.AdamW(fused=True)``; else forward and backward pass alone.
    """
    device = get_device().type
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    inputs_BT, labels_BT = _split(windows)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16) if autocasts else nullcontext():
            # Labels given apart, because with them alone transformers shifts ids and pads them.
            loss = model(input_ids=inputs_BT, labels=labels_BT, shift_labels=labels_BT, use_cache=False).loss
        loss.backward()
        if updates:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return float(loss.detach())

    return step


def make_ours(
    checkpoint: Path,
    windows: np.ndarray,
    *,
    bf16: bool,
    kernels: Literal["auto", "torch", "triton"] = "auto",
    updates: bool = True,
) -> Callable[[], float]:
    """Return a function that does one step of a training stage and returns the loss; needs a started engine.

    Args:
        checkpoint: of ``make_weights``.
        windows: [B, T + 1] token ids.
        bf16: weights in bf16 with fp32 masters and fp32 gradients.
        kernels: ``train.kernels``.
        updates: do all of ``train_step``; else forward and backward pass alone.
    """
    description = read_description(checkpoint)
    batch, seq_length = windows.shape[0], windows.shape[1] - 1
    models = build_chunks(
        description.shape, padded_vocab_size=description.padded_vocab_size, layout=Layout(kernels=kernels),
        seq_length=seq_length, bf16=bf16,
    )  # fmt: skip
    stage = StageSettings(name="one", tokens=1, blend={"en": 1.0}, lr=LEARNING_RATE, lr_warmup_fraction=0.0)
    trainer = build_trainer(models, TrainSettings(bf16=bf16, weight_decay=WEIGHT_DECAY), stage, num_steps=1000)
    load_weights(models, checkpoint)
    trainer.optimizer.reload_model_params()
    if updates:
        return lambda: train_step(trainer, windows, batch).loss
    inputs_BT, labels_BT = _split(windows)
    positions_BT = torch.arange(seq_length, device=inputs_BT.device).expand_as(inputs_BT)

    def run() -> float:
        (model,) = trainer.models
        model.zero_grad_buffer()
        loss_BT = model(inputs_BT, positions_BT, None, labels=labels_BT)
        # As in a step: the sum over tokens, which is scaled behind the backward pass.
        loss_BT.sum().backward()
        return float(loss_BT.detach().mean())

    return run


def _split(windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels, [B, T] each, where the engine runs."""
    ids_BT = torch.from_numpy(windows).to(get_device())
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()

"""Golden losses: what 20 steps of training give does not drift with versions, kernels or refactorings.

The weights and windows come from seeded generators, so the curve depends on nothing but the arithmetic of model, loss,
schedule and optimizer. When a change is meant to change it, the new numbers are written down here, with the reason in
the commit.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import LlamaModel, build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.shape import LlamaShape
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import train_step

T, NUM_STEPS = 32, 20
SHAPE = LlamaShape(
    num_layers=2, hidden_size=32, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=96, max_position_embeddings=64, layernorm_epsilon=1e-5, rotary_base=1e4, rope_scaling=None, tied=False,
)  # fmt: skip
GOLDEN = [
    4.626442, 4.638211, 4.474404, 4.456199, 4.255536, 4.227897, 4.058468, 4.029944, 3.893143, 3.861869,
    3.759028, 3.732021, 3.658109, 3.635193, 3.581582, 3.569064, 3.530467, 3.527897, 3.500027, 3.502323,
]  # fmt: skip


def train_steps(*, bf16):
    """Return the losses of ``NUM_STEPS`` steps over two batches that take turns."""
    model = build_model(SHAPE, padded_vocab_size=96, layout=Layout(), seq_length=T, bf16=bf16)
    # Drawn by numpy, whose streams never change.
    draw = np.random.Generator(np.random.PCG64(0))
    for parameter in model.parameters():
        parameter.data.copy_(torch.from_numpy(draw.uniform(-0.1, 0.1, parameter.shape)) + (parameter.ndim == 1))
    stage = StageSettings(name="one", tokens=1, blend={"en": 1.0}, lr=3e-3, min_lr=3e-4, lr_warmup_fraction=0.2)
    trainer = build_trainer([model], TrainSettings(bf16=bf16), stage, NUM_STEPS)
    trainer.optimizer.reload_model_params()
    batches = draw.integers(0, SHAPE.vocab_size, (2, 4, T + 1))
    return [train_step(trainer, batches[step % 2], 2).loss for step in range(NUM_STEPS)]


@pytest.fixture(scope="module")
def losses():
    """In fp32, in bf16, and in fp32 with the head and the loss of megatron-core."""
    with start_engine(Layout(), seed=1):
        unfused = (
            mock.patch.object(LlamaModel, "_postprocess", GPTModel._postprocess),
            mock.patch.object(LlamaModel, "compute_language_model_loss", GPTModel.compute_language_model_loss),
        )
        found = {"fp32": train_steps(bf16=False), "bf16": train_steps(bf16=True)}
        with unfused[0], unfused[1]:
            found["unfused"] = train_steps(bf16=False)
    return found


def test_the_curve_is_the_one_that_was_written_down(losses):
    assert losses["fp32"] == pytest.approx(GOLDEN, rel=1e-5)


def test_the_curve_in_bf16_follows_it(losses):
    assert losses["bf16"] == pytest.approx(GOLDEN, rel=3e-3)


def test_the_fused_loss_changes_no_curve(losses):
    assert losses["fp32"] == pytest.approx(losses["unfused"], rel=1e-6)

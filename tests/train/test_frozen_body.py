"""A stage in which the embeddings alone learn pays for nothing of the body but the way of the gradient through it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.engine.trainable import freeze_rest, is_vocabulary
from megatron_adapt.train.memory import Job, run_forward_backward
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import train_step
from tests.helpers.shapes import SMALL_SHAPE

# No two axes of a weight or of an activation have the same length, so that a gradient is known by its shape.
SHAPE = replace(
    SMALL_SHAPE, hidden_size=20, ffn_hidden_size=26, num_attention_heads=4, num_query_groups=2, kv_channels=6,
    vocab_size=90, qkv_bias=True,
)  # fmt: skip
TRAIN = TrainSettings(seq_length=13, micro_batch_size=3, global_batch_size=6, bf16=False)
WINDOWS = np.random.default_rng(0).integers(0, 90, (6, 14))


class ShapesOfBackward(TorchDispatchMode):
    """Notes the shape of every tensor that is made while a backward pass runs."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() != -1:
            made = out if isinstance(out, tuple | list) else [out]
            self.seen |= {tuple(tensor.shape) for tensor in made if isinstance(tensor, torch.Tensor)}
        return out


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def shape(request):
    with start_engine(Layout(), seed=0):
        yield replace(SHAPE, tied=request.param)


def make_trainer(shape, trainable, **settings):
    train = replace(TRAIN, **settings)
    model = build_model(shape, padded_vocab_size=96, layout=train, seq_length=13, bf16=train.bf16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.1, generator=generator) if weight.dim() > 1 else weight.fill_(1)
    freeze_rest(model, trainable)
    stage = StageSettings(name="one", tokens=1, blend={"en": 1.0}, trainable=trainable)
    return build_trainer([model], train, stage, num_steps=10)


def list_named(trainer, *, of_body):
    (model,) = trainer.bare_models
    return [weight for name, weight in model.named_parameters() if is_vocabulary(name) != of_body]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"use_distributed_optimizer": False}])
def test_the_body_has_neither_gradients_nor_buffers_nor_optimizer_state(shape, settings):
    trainer = make_trainer(shape, "embeddings", **settings)
    before = [weight.detach().clone() for weight in list_named(trainer, of_body=True)]
    train_step(trainer, WINDOWS, TRAIN.micro_batch_size)
    body, matrices = (list_named(trainer, of_body=of_body) for of_body in (True, False))
    assert len(body) == 7 * 2 + 1
    assert all(torch.equal(weight, old) for weight, old in zip(body, before, strict=True))
    assert not any(hasattr(weight, "main_grad") or weight.grad is not None for weight in body)
    assert all(weight.main_grad.abs().sum() > 0 for weight in matrices)
    num_values = sum(weight.numel() for weight in matrices)
    (buffer,) = trainer.models[0].buffers
    assert buffer.numel_unpadded == num_values
    (optimizer,) = trainer.optimizer.chained_optimizers
    state = optimizer.optimizer.state
    assert sum(weight.numel() for weight in state) == num_values
    assert sum(moment.numel() for moments in state.values() for moment in moments.values()) == 2 * num_values


@pytest.mark.parametrize("settings", [{}, {"recompute_granularity": "full"}], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("trainable", "learns"), [("all", True), ("embeddings", False)])
def test_backward_makes_no_tensor_of_the_shape_of_a_frozen_weight(shape, trainable, learns, settings):
    trainer = make_trainer(shape, trainable, **settings)
    job = Job(
        shape=shape, padded_vocab_size=96, train=replace(TRAIN, **settings), world_size=1, on_gpu=False,
        stage=StageSettings(name="one", tokens=1, blend={"en": 1.0}, trainable=trainable),
    )  # fmt: skip
    with ShapesOfBackward() as shapes:
        run_forward_backward(job, trainer.models[0])
    for weight in list_named(trainer, of_body=True):
        made = {tuple(weight.shape), tuple(weight.t().shape)} & shapes.seen
        # A view of the weight itself is no gradient: what multiplies in the forward pass that is done anew.
        if weight.dim() == 2 and not learns:
            made -= {tuple(weight.t().shape)}
        assert bool(made) == learns, (tuple(weight.shape), made)


def test_the_gradient_goes_through_a_frozen_body_to_the_input_as_through_one_that_learns(shape):
    found = []
    for trainable in ("all", "embeddings"):
        trainer = make_trainer(shape, trainable, clip_grad=0.0)
        train_step(trainer, WINDOWS, TRAIN.micro_batch_size)
        found.append([weight.main_grad.clone() for weight in list_named(trainer, of_body=False)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))

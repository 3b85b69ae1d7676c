"""Saved optimizer state is right where the engine alone corrupts it: several padded gradient buckets."""

from pathlib import Path

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_adapt.checkpoint.root import Description
from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.data.plan import BlendPosition, make_plan
from megatron_adapt.engine import reshard
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.shape import LlamaShape
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.state import load_state, save_state
from tests.helpers.spawn import run_ranks

SHAPE = LlamaShape(
    num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, kv_channels=6,
    vocab_size=90, max_position_embeddings=64, layernorm_epsilon=1e-5, rotary_base=1e4, rope_scaling=None, tied=False,
)  # fmt: skip
DESCRIPTION = Description(
    shape=SHAPE, true_vocab_size=90, padded_vocab_size=90, tokenizer_fingerprint="x", step=2, dtype="float32"
)
STAGE = StageSettings(name="one", tokens=1, blend={"en": 1.0}, lr=1e-2, lr_decay_style="constant")
PLAN = make_plan({"en": 1.0}, 64, {"en": 999}, seq_length=8, global_batch_size=4, seed=1)
POSITION = BlendPosition(PLAN, (8,), {"en": "data"})


NARROW = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


def build_bucketed(seed, **settings):
    """A trainer whose gradient buffer has many buckets, as overlapped reduction makes them."""
    model = build_model(SHAPE, padded_vocab_size=90, layout=Layout(), seq_length=16, bf16=False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    train = TrainSettings(bf16=False, clip_grad=0.0, overlap_grad_reduce=True, ddp_bucket_size=2000, **settings)
    return build_trainer([model], train, STAGE, num_steps=10)


def step_with_known_gradients(trainer, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in trainer.bare_models[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    trainer.optimizer.step()


def largest_difference_after_resume(folder, *, mended, **settings):
    if not mended:
        reshard.install = lambda: None
    expected = {torch.bfloat16 if settings.get("exp_avg_dtype") == "bf16" else torch.float32}
    with start_engine(Layout(), seed=1):
        straight = build_bucketed(seed=5, **settings)
        buffer = straight.models[0].buffers[0]
        padded = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        is_padded = any(padded[:-1]) or not settings.get("use_distributed_optimizer", True)
        assert is_padded, "no bucket before the last is padded: proves nothing"
        for step in (1, 2):
            step_with_known_gradients(straight, step)
        save_state(Path(folder), straight, DESCRIPTION, {}, POSITION)
        resumed = build_bucketed(seed=6, **settings)
        assert load_state(Path(folder), resumed, {}) == 2
        for trainer in (straight, resumed):
            for step in (3, 4):
                step_with_known_gradients(trainer, step)
            for moments in list_moments(trainer):
                assert {moment.dtype for moment in moments.values()} == expected
        pairs = zip(straight.bare_models[0].parameters(), resumed.bare_models[0].parameters(), strict=True)
        return max(float((one - other).abs().max()) for one, other in pairs)


def list_moments(trainer):
    (optimizer,) = trainer.optimizer.chained_optimizers
    return list(optimizer.optimizer.state.values())


def _resume(folder, mended, **settings):
    return largest_difference_after_resume(folder, mended=mended, **settings)


def _resume_narrow(folder, distributed):
    return _resume(folder, True, use_distributed_optimizer=distributed, **NARROW)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "distributed"), [(1, True), (2, True), (3, True), (2, False)])
def test_resume_with_moments_in_bf16_is_exact(num_ranks, distributed, tmp_path):
    assert run_ranks(_resume_narrow, num_ranks, str(tmp_path), distributed) == [0.0] * num_ranks


@pytest.mark.slow
def test_resume_with_padded_buckets_at_three_ranks_is_exact(tmp_path):
    assert run_ranks(_resume, 3, str(tmp_path / "mended"), True) == [0.0] * 3


@pytest.mark.slow
def test_the_engine_alone_gets_it_wrong(tmp_path):
    """When this fails the engine has mended itself, and ``engine/reshard.py`` can go."""
    assert min(run_ranks(_resume, 3, str(tmp_path / "plain"), False)) > 1e-3


def test_installing_the_mend_twice_wraps_once():
    reshard.install()
    first = DistributedOptimizer.get_parameter_state_dp_zero
    reshard.install()
    assert DistributedOptimizer.get_parameter_state_dp_zero is first

"""The CPU stand-ins serve megatron-core and nobody else."""

import subprocess
import sys

import pytest
import torch

from megatron_adapt.config import Layout
from megatron_adapt.engine import cpu
from megatron_adapt.engine.parallel import start_engine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the stand-ins are not installed")


def test_torch_outside_the_engine_is_unchanged():
    cpu.install()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|cuda|NVIDIA"):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|cuda|NVIDIA"):
        torch.zeros(1).cuda()


def test_engine_modules_imported_later_are_served_too():
    code = (
        "from megatron_adapt.engine import cpu; cpu.install();"
        "import megatron.core.tensor_parallel.mappings as early, megatron.core.optimizer.clip_grads as late, torch;"
        "assert early.torch is not torch and late.torch is early.torch;"
        "assert late.torch.tensor([1.0], device='cuda').device.type == 'cpu';"
        "assert late.torch.cuda.current_device().type == 'cpu'"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_installing_twice_changes_nothing():
    cpu.install()
    first = torch.Tensor.cuda
    cpu.install()
    assert torch.Tensor.cuda is first


def test_engine_can_be_started_again_in_one_process():
    for seed in (1, 2):
        with start_engine(Layout(), seed=seed):
            assert torch.distributed.get_world_size() == 1
    assert not torch.distributed.is_initialized()

"""How fast a stage trains, on what share of the hardware's peak, and how long it will still take.

- ``tokens_per_second``: of the whole job. The time is that of reading windows and of steps; validation, saving and
  writing metrics do not count.
- ``tflops_per_device``: ``tokens_per_second * count_flops(...) / devices``, in 10^12 operations of the model a second
  (``flops``: which ones). Not in a stage of token distillation, which runs neither head nor one pass a token.
- ``mfu`` (model FLOPs utilisation, Chowdhery et al. 2022, arXiv 2204.02311, appendix B): that over the peak of a device
  in the type of the run. On a GPU the data sheet's, by name; without it for one that is not in the table. On a CPU what
  a matrix product reached on all ranks at once when the launch began: a share of what these threads can do.
- ``data_wait_share``: time in which a rank read windows, of the same time; of the rank that waited longest.
- ``peak_memory_gb``: most that a rank has held so far, of the rank that held most; torch's tensors on a GPU, the whole
  process on a CPU.
- ``eta_seconds``: to the end of the stage, from the mean of this launch with its validations and saves;
  ``cost_to_finish``: that at ``device_hour_price``.

Costs: one reduction of two numbers a row; a tenth of a second at the start on a CPU.
"""

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_adapt.engine.parallel import get_device
from megatron_adapt.train.flops import count_flops, find_device
from megatron_adapt.train.inputs import StageInputs

_GEMM_SIZE = 512
_GEMM_SECONDS = 0.1
_logger = logging.getLogger(__name__)


class Throughput:
    """The clock of a launch; every rank has one."""

    def __init__(self, inputs: StageInputs) -> None:
        settings, model = inputs.settings, inputs.description
        self._price = settings.device_hour_price
        self._batches = inputs.batches
        self._seq_length = settings.seq_length
        self._flops_per_token: float | None = None
        self._peak: float | None = None
        if inputs.distillation is None:
            learns = inputs.place.settings.trainable, model.new_blocks
            self._flops_per_token = count_flops(model.shape, settings.seq_length, *learns)
            self._peak = find_peak(bf16=settings.bf16)
        self.start(0)

    def start(self, step: int) -> None:
        """Begin to count behind a step."""
        self._begun = self._since = time.perf_counter()
        self._first = self._step = step
        self._reading = self._pausing = 0.0

    @contextmanager
    def read(self) -> Iterator[None]:
        """Count what is done in here as waiting for data."""
        begun = time.perf_counter()
        yield
        self._reading += time.perf_counter() - begun

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count what is done in here as no training."""
        begun = time.perf_counter()
        yield
        self._pausing += time.perf_counter() - begun

    def measure(self, step: int) -> dict[str, float]:
        """Return the numbers of the steps since the last call, the last of them ``step``; all ranks call this."""
        now = time.perf_counter()
        seconds = now - self._since - self._pausing
        first, before, here, last = map(
            self._batches.count_windows, (self._first, self._step, step, self._batches.num_steps)
        )
        speed = (here - before) * self._seq_length / seconds
        left = (last - here) * (now - self._begun) / (here - first)
        worst = torch.tensor([self._reading / seconds, measure_memory()], dtype=torch.float64, device=get_device())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        self._since, self._step, self._reading, self._pausing = now, step, 0.0, 0.0
        wait, memory = worst.tolist()
        num_devices = dist.get_world_size()
        found = {"tokens_per_second": speed}
        if self._flops_per_token is not None:
            found |= rate(speed, self._flops_per_token, num_devices, self._peak)
        found |= {"data_wait_share": wait, "peak_memory_gb": memory / 1e9, "eta_seconds": left}
        if self._price:
            found["cost_to_finish"] = compute_cost(left, num_devices, self._price)
        return found


def rate(tokens_per_second: float, flops_per_token: float, num_devices: int, peak: float | None) -> dict[str, float]:
    """Return operations of the model a second on one device, and their share of its peak.

    Args:
        tokens_per_second: of the whole job.
        flops_per_token: operations of the model for a token.
        num_devices: ranks of the job.
        peak: operations a second that a device can reach; None leaves the share out.
    """
    reached = tokens_per_second * flops_per_token / num_devices
    return {"tflops_per_device": reached / 1e12, **({} if peak is None else {"mfu": reached / peak})}


def compute_cost(seconds: float, num_devices: int, device_hour_price: float) -> float:
    """Return the price of so many seconds on all devices of a job."""
    return seconds / 3600 * num_devices * device_hour_price


def find_peak(*, bf16: bool) -> float | None:
    """Return operations a second that the device of a rank can reach; all ranks call this.

    Returns:
        Of a GPU what its data sheet says, None where that is not known. Of a CPU the mean of all ranks, measured at
        the same time.
    """
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        device = find_device(name)
        if device is None:
            _logger.info("%s: its peak is not in the table, so there is no MFU", name)
            return None
        return 1e12 * (device.bf16_tflops if bf16 else device.fp32_tflops)
    dist.barrier()
    total = torch.tensor(measure_gemm(torch.bfloat16 if bf16 else torch.float32), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def measure_gemm(dtype: torch.dtype) -> float:
    """Return operations a second that a product of square matrices reaches on the threads of this rank, at best."""
    matrix = torch.ones(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype)
    best, end = 0.0, time.perf_counter() + _GEMM_SECONDS
    # At least twice: the first one prepares.
    for turn in range(1 << 20):
        begun = time.perf_counter()
        torch.mm(matrix, matrix)
        now = time.perf_counter()
        best = max(best, 2 * _GEMM_SIZE**3 / (now - begun))
        if turn and now > end:
            break
    return best


def measure_memory() -> float:
    """Return the bytes that this rank has held at most: of tensors on a GPU, of the process on a CPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return float(held if sys.platform == "darwin" else held * 1024)

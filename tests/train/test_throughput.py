"""Speed, share of the peak, time and money left: counted by hand, with a clock that the test winds."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.data.batches import Batches
from megatron_adapt.engine.parallel import Layout, start_engine
from megatron_adapt.train import throughput
from megatron_adapt.train.flops import DEVICES, count_flops, find_device
from megatron_adapt.train.throughput import Throughput, compute_cost, find_peak, measure_gemm, rate
from tests.helpers.shapes import SMALL_SHAPE

SHAPE = replace(SMALL_SHAPE, ffn_hidden_size=10, vocab_size=90)


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock, the other ranks and the memory of this one."""
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "find_peak", lambda *, bf16: 1e6 if bf16 else 5e5)
    monkeypatch.setattr(throughput, "measure_memory", lambda: 3e9)
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return clock


def make_inputs(*, trainable="all", distillation=None, **settings):
    stage = StageSettings(name="one", tokens=1, blend={"en": 1.0}, trainable=trainable)
    return SimpleNamespace(
        settings=TrainSettings(seq_length=15, global_batch_size=4, **settings),
        description=SimpleNamespace(shape=SHAPE, padded_vocab_size=100, new_blocks=()),
        place=SimpleNamespace(settings=stage),
        batches=Batches.of(stage, num_windows=40, global_batch_size=4),
        distillation=distillation,
    )


def run_two_steps(clock, inputs):
    """Two steps of 3 seconds, one of them for data; then 4 seconds of validation, and a step of 2."""
    speed = Throughput(inputs)
    clock.now += 50  # the validation before the first step
    speed.start(4)
    for _ in range(2):
        with speed.read():
            clock.now += 1
        clock.now += 2
    rows = [speed.measure(6)]
    with speed.pause():
        clock.now += 4
    clock.now += 2
    return [*rows, speed.measure(7)]


def test_numbers_of_a_row_by_hand(clock):
    first, second = run_two_steps(clock, make_inputs(device_hour_price=1.8))
    # Query 8x8, key and value 4x8 each, output 8x8: 192. Gate, up and down, each 10x8: 240. Two layers, head 100x8.
    # Forward, and twice that backward; scores and their sum over (15 + 1) / 2 keys, two layers.
    flops = 3 * 2 * (2 * (192 + 240) + 720) + 3 * 2 * (2 * 2 * 8 * 8)
    # Two steps of 4 windows of 15 tokens in 6 seconds, on two devices of 10^6 operations a second.
    assert first == pytest.approx(
        {
            "tokens_per_second": 20,
            "tflops_per_device": 20 * flops / 2 / 1e12,
            "mfu": 20 * flops / 2 / 1e6,
            "data_wait_share": 2 / 6,
            "peak_memory_gb": 3,
            # Four steps are left, each of 3 seconds; both devices at 1.8 an hour.
            "eta_seconds": 12,
            "cost_to_finish": 12 / 3600 * 2 * 1.8,
        }
    )
    # The validation does not slow the step behind it, but it is part of what the rest will take.
    assert second["tokens_per_second"] == pytest.approx(30)
    assert second["data_wait_share"] == 0
    assert second["eta_seconds"] == pytest.approx(3 * 12 / 3)


def test_a_frozen_body_counts_without_the_gradients_of_its_matrices(clock):
    (row, _), (whole, _) = (run_two_steps(clock, make_inputs(trainable=it)) for it in ("embeddings", "all"))
    body, head, attention = 2 * (192 + 240), 720, 3 * 2 * (2 * 2 * 8 * 8)
    assert row["mfu"] == pytest.approx(20 / 2 * (4 * body + 6 * head + attention) / 1e6)
    assert whole["mfu"] - row["mfu"] == pytest.approx(20 / 2 * 2 * body / 1e6)
    assert "cost_to_finish" not in row


def test_what_is_not_known_is_left_out(clock, monkeypatch):
    row, _ = run_two_steps(clock, make_inputs(distillation=object()))
    assert not {"mfu", "tflops_per_device"} & set(row)
    monkeypatch.setattr(throughput, "find_peak", lambda *, bf16: None)
    row, _ = run_two_steps(clock, make_inputs())
    assert "mfu" not in row
    assert row["tflops_per_device"] > 0


def test_70b_on_64_h100_by_hand():
    """Llama 2 70B at 4,096 tokens: 8 groups of 64 heads, 80 layers, head of 32,000 rows."""
    shape = replace(
        SHAPE, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8,
        kv_channels=128, vocab_size=32000,
    )  # fmt: skip
    layer = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672
    flops = 6 * (80 * layer + 32000 * 8192) + 3 * 80 * 4 * 8192 * 4097 / 2
    found = rate(60_000, count_flops(shape, 4096, "all"), 64, 989.5e12)
    assert found == pytest.approx(
        {"tflops_per_device": 60_000 * flops / 64 / 1e12, "mfu": 60_000 * flops / 64 / 989.5e12}
    )
    assert found["mfu"] == pytest.approx(0.41, abs=0.01)
    assert compute_cost(7200, 64, 2.5) == 320


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        # Other forms of a chip that has a row, and chips that have none.
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40S", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_device_is_found_by_the_name_that_cuda_gives_it(name, device):
    assert find_device(name) == (None if device is None else DEVICES[device])


@pytest.mark.parametrize(("bf16", "peak"), [(True, 989.5e12), (False, 67e12)])
def test_the_peak_of_a_gpu_is_that_of_the_type_of_the_run(bf16, peak, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert find_peak(bf16=bf16) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40S")
    with caplog.at_level("INFO", logger="megatron_adapt"):
        assert find_peak(bf16=bf16) is None
    assert "NVIDIA L40S: its peak is not in the table, so there is no MFU" in caplog.text


def test_the_peak_of_a_cpu_is_what_a_product_reaches_there():
    with start_engine(Layout(), seed=1):
        assert 1e7 < find_peak(bf16=False) < 1e14
    assert 1e7 < measure_gemm(torch.bfloat16) < 1e14

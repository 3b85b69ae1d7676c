"""What a stage writes down of its steps: ``metrics.jsonl``, a line on the console, TensorBoard, Weights & Biases.

A row has the step, the loss of that step, its gradient norm and learning rate, the training loss since the row before
in bits per byte (``tally``), the tokens of every source so far, and the numbers of ``throughput``. With a validation
come ``valid_bits_per_byte`` of every source and every language of several, and ``forgetting``: that of each old
language minus that of the base. The base is row 0 of the run's first stage: the resized model before any training, on
the same windows (``valid_windows`` of row 0 is their hash; a language whose windows differ is left out).
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megatron_adapt.config.names import get_language
from megatron_adapt.engine.parallel import get_device
from megatron_adapt.logs import MetricsWriter, is_main_rank, read_metrics
from megatron_adapt.train.inputs import StageInputs
from megatron_adapt.train.sinks import flatten_row, open_sinks
from megatron_adapt.train.step import StepReport
from megatron_adapt.train.tally import BatchSources, SourceTally, merge_languages
from megatron_adapt.train.throughput import Throughput

METRICS_FILE = "metrics.jsonl"
_logger = logging.getLogger(__name__)


class StageMetrics:
    """Collects the numbers of a launch on every rank, and writes them on the main one."""

    def __init__(self, inputs: StageInputs, first: int) -> None:
        self.clock = Throughput(inputs)
        self._inputs = inputs
        self._tally = SourceTally(inputs.blend.plan.sources)
        self._token_bytes_V = torch.from_numpy(inputs.token_bytes_V).to(get_device())
        self._base: dict[str, float] | None = None
        self._writer: MetricsWriter | None = None
        self._sinks = []
        if is_main_rank():
            # Step 0 is measured again when a run starts over.
            self._writer = MetricsWriter(inputs.root / METRICS_FILE, first or -1)
            name = inputs.place.settings.name
            self._sinks = open_sinks(inputs.settings, name, inputs.root, first, inputs.config)

    def __enter__(self) -> "StageMetrics":
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what was opened."""
        for sink in self._sinks:
            sink.close(failed=kind is not None)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        """Of the validation windows, which stay the same."""
        return hash_windows(self._inputs)

    def name_sources(self, sources_B: Any) -> BatchSources | None:
        """Return what a step needs to sum by source; None where its loss is none of next tokens."""
        if self._inputs.distillation is not None:
            return None
        num_sources = len(self._inputs.blend.plan.sources)
        return BatchSources(sources_B=sources_B, num_sources=num_sources, token_bytes_V=self._token_bytes_V)

    def add(self, report: StepReport) -> None:
        """Count a step for the next row."""
        self._tally.add(report.by_source)

    def make_row(self, step: int, report: StepReport, *, skipped_steps: int) -> dict[str, Any]:
        """Return the row of the steps since the one before; all ranks call this."""
        distilled = {"objective": "token_distillation", "positions_left_out": report.num_left_out}
        bits, decoupled, batches = self._tally.take(), report.decoupled_learning_rate, self._inputs.batches
        return {
            "step": step,
            **(distilled if self._inputs.distillation is not None else {}),
            "loss": report.loss,
            **({"bits_per_byte": bits} if bits else {}),
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            **({} if decoupled is None else {"decoupled_learning_rate": decoupled}),
            **({"global_batch_size": batches.find(step)[1]} if batches.is_ramped else {}),
            "tokens": count_tokens(self._inputs, step),
            "skipped_steps": skipped_steps,
            **self.clock.measure(step),
        }

    def write(self, row: dict[str, Any], valid: Mapping[str, float] | None = None) -> None:
        """Write a row, and the bits per byte of a validation, wherever they are to go.

        Args:
            row: ``{"step": 0}``, or what ``make_row`` returned.
            valid: bits per byte of each source's validation windows; None where there was no validation.
        """
        if self._writer is None:
            return
        if valid is not None:
            row |= self._describe_validation(valid, row["step"])
        self._writer.write(row)
        for sink in self._sinks:
            sink.write(row["step"], dict(flatten_row({name: row[name] for name in row if name != "step"})))
        _logger.info("%s", describe_row(row, self._inputs.batches.num_steps))

    def _describe_validation(self, valid: Mapping[str, float], step: int) -> dict[str, Any]:
        """Return what a row says of a validation."""
        inputs, hashes = self._inputs, self._hashes
        num_bytes = {name: int(inputs.token_bytes_V[windows[:, 1:]].sum()) for name, windows in inputs.valid.items()}
        merged = merge_languages({name: valid[name] * num_bytes[name] for name in valid}, num_bytes)
        bits = {**merged, **valid}
        if step == 0 and inputs.place.settings.name == inputs.first_stage:
            self._base = bits
            return {"valid_bits_per_byte": bits, "valid_windows": hashes}
        if self._base is None:
            old = {name: hashes[name] for name in inputs.old_languages if name in hashes}
            self._base = find_base(inputs.place.run.checkpoints(inputs.first_stage) / METRICS_FILE, old)
        forgetting = {name: bits[name] - self._base[name] for name in inputs.old_languages if name in self._base}
        return {
            "valid_bits_per_byte": bits,
            **({"forgetting": forgetting} if forgetting else {}),
            **({"valid_windows": hashes} if step == 0 else {}),
        }


def hash_windows(inputs: StageInputs) -> dict[str, str]:
    """Return for each language a hash of what it is validated on."""
    hashes: dict[str, Any] = {}
    for source in sorted(inputs.valid):
        found = hashes.setdefault(get_language(source), hashlib.sha256(str(inputs.reset_at).encode()))
        found.update(f"{source} {inputs.valid[source].shape}".encode() + inputs.valid[source].tobytes())
    return {language: found.hexdigest()[:16] for language, found in hashes.items()}


def find_base(path: Path, hashes: Mapping[str, str]) -> dict[str, float]:
    """Return the bits per byte of the base, of the languages that were measured on the same windows.

    Args:
        path: metrics of the first stage.
        hashes: the windows of each language now (``hash_windows``).
    """
    rows = read_metrics(path) if path.is_file() else []
    row = next((row for row in rows if row["step"] == 0), {})
    before = row.get("valid_windows", {})
    same = {name for name, found in hashes.items() if before.get(name) == found}
    for name in sorted(set(hashes) - same):
        _logger.info("%s: the base was not measured on the validation windows of %s; no forgetting", path, name)
    return {
        name: value for name, value in row.get("valid_bits_per_byte", {}).items() if name in same and value is not None
    }


def count_windows(inputs: StageInputs, step: int) -> tuple[int, ...]:
    """Count the windows of each source that were trained on up to ``step``."""
    return tuple(int(count) for count in inputs.blend.count_before(inputs.batches.count_windows(step)))


def count_tokens(inputs: StageInputs, step: int) -> dict[str, int]:
    """Count the tokens of each source, and of each language of several, that were trained on up to ``step``."""
    counts = (windows * inputs.settings.seq_length for windows in count_windows(inputs, step))
    tokens = dict(zip(inputs.blend.plan.sources, counts, strict=True))
    languages: Counter[str] = Counter()
    for source, count in tokens.items():
        languages[get_language(source)] += count
    return {**tokens, **languages}


def describe_row(row: Mapping[str, Any], num_steps: int) -> str:
    """Return the console line of a row; of several sources of a language it shows the language."""
    return "  ".join([f"step {row['step']}/{num_steps}", *_describe_step(row), *_describe_bits(row)])


def _describe_step(row: Mapping[str, Any]) -> Iterator[str]:
    if "loss" not in row:
        return
    yield f"loss {row['loss']:.4f}" if "objective" not in row else f"squared error {row['loss']:.4g}"
    yield f"lr {row['learning_rate']:.2e}"
    yield f"grad norm {row['grad_norm']:.2f}"
    yield f"{row['tokens_per_second']:,.0f} tokens/s"
    if "tflops_per_device" in row:
        yield f"{row['tflops_per_device']:,.3g} TFLOP/s"
    if "mfu" in row:
        yield f"MFU {row['mfu']:.1%}"
    yield f"data wait {row['data_wait_share']:.1%}"
    yield f"memory {row['peak_memory_gb']:.1f} GB"
    yield f"{timedelta(seconds=round(row['eta_seconds']))} left"
    if "cost_to_finish" in row:
        yield f"costs {row['cost_to_finish']:,.2f} more"


def _describe_bits(row: Mapping[str, Any]) -> Iterator[str]:
    forgetting = row.get("forgetting", {})
    for title, name in (("train", "bits_per_byte"), ("valid", "valid_bits_per_byte")):
        languages = {language: value for language, value in row.get(name, {}).items() if "/" not in language}
        shown = [
            f"{language} {value:.4f}"
            + (f" ({forgetting[language]:+.4f})" if title == "valid" and language in forgetting else "")
            for language, value in languages.items()
        ]
        if shown:
            yield f"{title} {', '.join(shown)} bits/byte"

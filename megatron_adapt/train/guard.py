"""What a run does about steps that went wrong: count those left out, report spikes of the loss, write down their data.

Reads: the report of every step. Writes, on the main rank: ``non_finite/step_N.json`` and ``loss_spikes/step_N.json``
beside the checkpoints of the stage, with loss, norm and learning rate of the step, and the windows and documents it
was made of, found by the code that training reads them with (``data/trace``).

1. ``check``: after every step, on every rank.
2. ``_count_skipped``: a step whose loss or gradient is not finite was left out (``finite.py``). It counts as a step:
   the schedule goes on and its windows are not read again, so that the step number alone says where the run stands.
   Too many in a row stop the run; a launch counts from none.
3. ``LossHistory``: whether the loss of a step is a spike. One report for each: until it is back in its usual range.

The rule of a spike: a loss above ``median + factor * max(1.4826 * MAD, 1 % of the median)`` of the last 100 losses,
once there are 20. MAD is the median distance to the median, 1.4826 of it the standard deviation where losses are normal
(Rousseeuw and Croux 1993). Mean and standard deviation would not do: a single spike widens both, and hides the next.
Where windows come again and again the losses hardly differ, and any would be far out: hence the 1 %. The history begins
anew with every launch.
"""

import logging
import math
from collections import deque
from dataclasses import asdict
from statistics import median
from typing import Any

import torch.distributed as dist

from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.trace import trace_windows
from megatron_adapt.errors import EngineError
from megatron_adapt.files import write_json
from megatron_adapt.logs import is_main_rank
from megatron_adapt.train.inputs import StageInputs
from megatron_adapt.train.step import StepReport

NON_FINITE_FOLDER, SPIKES_FOLDER = "non_finite", "loss_spikes"
_HISTORY, _ENOUGH = 100, 20
_NORMAL = 1.4826
_LEAST_SPREAD = 0.01
_logger = logging.getLogger(__name__)


class StepGuard:
    """Looks at every step of a launch."""

    def __init__(self, inputs: StageInputs, first: int) -> None:
        """Begin behind step ``first``; what was written of later steps is dropped, for they are done again."""
        self._inputs = inputs
        self._in_a_row = 0
        self._history = LossHistory(inputs.settings.loss_spike_factor)
        self.num_skipped = 0
        "Steps of the stage that were left out; known to the main rank."
        if not is_main_rank():
            return
        for name in (NON_FINITE_FOLDER, SPIKES_FOLDER):
            for path in (inputs.root / name).glob("step_*.json"):
                if int(path.stem.removeprefix("step_")) > first:
                    path.unlink()
        self.num_skipped = len(list((inputs.root / NON_FINITE_FOLDER).glob("step_*.json")))

    def check(self, step: int, report: StepReport) -> None:
        """Judge a step; every rank calls this.

        Raises:
            EngineError: more steps in a row were left out than ``max_skipped_steps``.
        """
        if report.is_skipped:
            self._count_skipped(step, report)
            return
        self._in_a_row = 0
        usual = self._history.find_spike(report.loss)
        if usual is not None and is_main_rank():
            path = self._write(SPIKES_FOLDER, step, report, usual_loss=usual)
            _logger.warning(
                "step %d: loss %.4f, usual are %.4f to %.4f; its documents are in %s", step, report.loss, *usual, path
            )

    def _count_skipped(self, step: int, report: StepReport) -> None:
        self._in_a_row += 1
        self.num_skipped += 1
        limit, root = self._inputs.settings.max_skipped_steps, self._inputs.root
        if is_main_rank():
            path = self._write(NON_FINITE_FOLDER, step, report)
            _logger.warning(
                "step %d left out: loss %s, norm of the gradient %s; %d in a row, its documents are in %s",
                *(step, report.loss, report.grad_norm, self._in_a_row, path),
            )
        if self._in_a_row <= limit:
            return
        # A rank that ends brings the others down, and the main rank may still be writing.
        dist.barrier()
        raise EngineError(
            f"step {step}: loss {report.loss}, norm of the gradient {report.grad_norm}, {self._in_a_row} in a row; the "
            f"run diverged at learning rate {report.learning_rate:g}; look at the documents in "
            f"{root / NON_FINITE_FOLDER}, lower the learning rate, and start again to continue from the last checkpoint"
        )

    def _write(self, folder: str, step: int, report: StepReport, **more: Any) -> str:
        """Write what a step was made of; return the file."""
        path = self._inputs.root / folder / f"step_{step}.json"
        windows = _list_windows(self._inputs, step)
        for at in report.non_finite:
            windows[at]["is_non_finite"] = True
        record = {
            "step": step,
            "loss": _name_number(report.loss),
            "grad_norm": _name_number(report.grad_norm),
            "learning_rate": report.learning_rate,
            **more,
            "windows": windows,
        }
        write_json(path, record)
        return str(path)


def _name_number(value: float) -> float | str:
    """Return a number as JSON has it: it knows neither nan nor inf."""
    return value if math.isfinite(value) else str(value)


def _list_windows(inputs: StageInputs, step: int) -> list[dict[str, Any]]:
    """Describe the windows of a step; where megatron-core orders them, by place and source alone."""
    blend, (first, count) = inputs.blend, inputs.batches.find(step)
    if isinstance(blend, BlendedWindows):
        return [asdict(window) for window in trace_windows(blend, first, count)]
    sources_N = blend.read_windows(first, count).sources_N
    return [{"place": first + at, "source": blend.plan.sources[source]} for at, source in enumerate(sources_N)]


class LossHistory:
    """The last losses, and what is usual among them."""

    def __init__(self, factor: float) -> None:
        """Begin without losses; ``factor`` 0 finds no spikes."""
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._is_in_spike = False

    def find_spike(self, loss: float) -> tuple[float, float] | None:
        """Add a loss; return the usual range, lowest and highest, where a spike begins with it."""
        usual = self._find_usual()
        self._losses.append(loss)
        was_in_spike, self._is_in_spike = self._is_in_spike, usual is not None and loss > usual[1]
        return usual if self._is_in_spike and not was_in_spike else None

    def _find_usual(self) -> tuple[float, float] | None:
        if not self._factor or len(self._losses) < _ENOUGH:
            return None
        middle = median(self._losses)
        spread = max(_NORMAL * median(abs(loss - middle) for loss in self._losses), _LEAST_SPREAD * abs(middle))
        return middle - self._factor * spread, middle + self._factor * spread

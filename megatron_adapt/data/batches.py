"""Which windows make which step of a stage, and which step begins at a window.

A stage reads its windows in the order of its plan. Mostly a step takes ``global_batch_size`` of them. With a ramp
(Megatron-LM's ``--rampup-batch-size START INCREMENT SAMPLES``) the first steps take START, and the batch grows by
INCREMENT after equal parts of the first SAMPLES windows; the last step takes what is left. So the plan, and what is
read of each source, are the same with a ramp and without one; there are only more steps.

Source: megatron-core 0.16 ``num_microbatches_calculator.py`` (``RampupBatchsizeNumMicroBatchesCalculator.update``).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.config import StageSettings
from megatron_adapt.errors import ConfigError


@dataclass(frozen=True)
class Batches:
    """The steps of a stage, from 1."""

    ends_S: NDArray[np.int64]
    "Windows read before the first step, and up to every step."
    is_ramped: bool

    @classmethod
    def of(cls, stage: StageSettings, *, num_windows: int, global_batch_size: int) -> "Batches":
        """Cut the windows of a stage into steps.

        Args:
            stage: settings of the stage.
            num_windows: windows of its plan.
            global_batch_size: windows in a step, behind the ramp.

        Raises:
            ConfigError: the ramp does not lead to the batch.
        """
        if not stage.rampup_batch_size:
            return cls(np.arange(num_windows // global_batch_size + 1) * global_batch_size, is_ramped=False)
        start, increment, samples = stage.rampup_batch_size
        rise = global_batch_size - start
        if rise <= 0 or rise % increment:
            raise ConfigError(
                f"train.stages {stage.name}: rampup_batch_size: from {start} in steps of {increment} leads past "
                f"train.global_batch_size {global_batch_size}, or not to it; choose a start below it and a divisor of "
                "the rise"
            )
        ends, per_increment = [0], samples / (rise // increment)
        while ends[-1] < num_windows:
            done = ends[-1]
            size = global_batch_size if done > samples else start + int(done / per_increment) * increment
            ends.append(min(done + size, num_windows))
        return cls(np.array(ends), is_ramped=True)

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return len(self.ends_S) - 1

    def count_windows(self, step: int) -> int:
        """Count the windows read up to a step, its own included."""
        return int(self.ends_S[step])

    def find(self, step: int) -> tuple[int, int]:
        """Return the place of the first window of a step, and how many it takes."""
        first = self.count_windows(step - 1)
        return first, self.count_windows(step) - first

    def find_step(self, place: int) -> int:
        """Return the step that begins at a window."""
        return int(np.searchsorted(self.ends_S, place)) + 1

    def count_progress(self, step: int) -> int:
        """Count how far the schedule of the learning rate is: in steps, or with a ramp in windows."""
        return self.count_windows(step) if self.is_ramped else step

    def check_unit(self, where: str, unit: int) -> None:
        """Refuse steps that the ranks cannot share.

        Args:
            where: for messages.
            unit: windows that a batch must be a multiple of (``count_batch_unit``).

        Raises:
            ConfigError: a batch is not.
        """
        for size in np.unique(np.diff(self.ends_S)).tolist():
            if size % unit:
                raise ConfigError(
                    f"{where}: rampup_batch_size: a batch of {size} windows is not a multiple of the {unit} that all "
                    f"ranks take at once; use multiples of {unit}"
                )

"""Settings of ``tools/plan_run.py``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_adapt.config.require import require

DeviceName = Literal["a100-40", "a100", "h100", "h200", "b200", "cpu"]


@dataclass(frozen=True, kw_only=True)
class PlanRun:
    """Say what the training stages of a recipe take on so many ranks: memory, time, checkpoints, communication."""

    world_size: int
    "Ranks of the job."
    stage: str = ""
    "Training stage to plan; all of the recipe without it."
    config: Path | None = None
    "config.json of the base model, where the recipe's base_model is not on this machine."
    device: DeviceName = "h100"
    "What a rank runs on; a100 and h100 have 80 GB. A cpu needs --device-memory, and has no peak to plan with."
    device_memory: float = 0.0
    "Memory of a device in GB; 0 takes that of its data sheet."
    mfu: float = 0.4
    "Share of the device's peak that the model's arithmetic reaches, pipeline bubble included."
    save_speed: float = 1.0
    "GB per second that the whole job writes to disk."
    json: Path | None = None
    "Also write the figures to this file."

    def __post_init__(self) -> None:
        require(self.world_size >= 1, f"--world-size: {self.world_size} is below 1")
        require(self.device_memory >= 0, f"--device-memory: {self.device_memory} is below 0; 0 takes the data sheet's")
        require(
            self.device != "cpu" or self.device_memory > 0,
            "--device-memory: missing; a cpu has no data sheet, name the GB that a rank may take",
        )
        require(0 < self.mfu <= 1, f"--mfu: {self.mfu} is not between 0 and 1; 0.4 is usual")
        require(self.save_speed > 0, f"--save-speed: {self.save_speed} is not positive; name GB per second")

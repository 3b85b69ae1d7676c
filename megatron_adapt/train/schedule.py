"""Learning rate of a stage, counted in optimizer steps: megatron-core's schedules, and one that it lacks.

Every stage warms up from 0 (re-warming, Ibrahim et al. 2024, arXiv 2403.08763). Then, by ``lr_decay_style``:

- ``cosine``, ``linear``: down to ``min_lr`` at the last step. ``constant``: no decay.
- ``WSD``: constant, and over the last ``lr_wsd_decay_fraction`` of the steps down to ``min_lr`` by
  ``lr_wsd_decay_style``.
- ``infinite`` (the same paper, section 4.3): over ``lr_cooldown_fraction`` of the steps a cosine down to
  ``lr_constant``, then constant - here data may be added or exchanged without warming up again - and over the last
  ``lr_wsd_decay_fraction`` exponentially down to ``min_lr``.

With ``decoupled_lr`` (Megatron-LM's ``--decoupled-lr``) the vocabulary matrices have a peak and an end of their own in
a schedule of the same form; what ``infinite`` keeps is in the proportion of the peaks.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megatron_adapt.config import StageSettings

_INFINITE = ("lr_constant", "lr_cooldown_fraction", "lr_wsd_decay_fraction")


class InfiniteSchedule(OptimizerParamScheduler):  # type: ignore[misc]
    """Warm-up, cool-down, a constant that may go on for ever, and an annealing before a release."""

    def __init__(self, *args: Any, stage: StageSettings, **kwargs: Any) -> None:
        """As the engine's; the shares are those of the stage."""
        self.stage = stage
        super().__init__(*args, **kwargs)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the learning rate of the step."""
        peak, last = float(param_group["max_lr"]), float(param_group["min_lr"])
        constant = self.stage.lr_constant * (peak / self.stage.lr)
        done = int(self.num_steps - self.lr_warmup_steps)
        if done <= 0:
            return float(peak * self.num_steps / max(1, self.lr_warmup_steps))
        cooldown = max(1, round(self.stage.lr_cooldown_fraction * self.lr_decay_steps))
        if done < cooldown:
            return constant + (peak - constant) * 0.5 * (1 + math.cos(math.pi * done / cooldown))
        annealing = round(self.stage.lr_wsd_decay_fraction * self.lr_decay_steps)
        left = self.lr_decay_steps - self.num_steps
        if left >= annealing:
            return constant
        return float(constant * (last / constant) ** (1 - max(0, left) / annealing))


def describe_schedule(schedule: OptimizerParamScheduler) -> dict[str, Any]:
    """Return what decides the learning rate of every step, and that of the last one that was done."""
    names = "max_lr min_lr lr_warmup_steps lr_decay_steps lr_decay_style wsd_decay_steps lr_wsd_decay_style"
    described = {name: getattr(schedule, name) for name in names.split()}
    if isinstance(schedule, InfiniteSchedule):
        described |= {name: getattr(schedule.stage, name) for name in _INFINITE}
    own = next((group for group in schedule.optimizer.param_groups if group.get("is_decoupled_lr")), None)
    if own is not None:
        described |= {"decoupled_lr": own["max_lr"], "decoupled_min_lr": own["min_lr"]}
    return {"learning_rate": read_rates(schedule.optimizer)[0], **described}


def describe_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words how two of ``describe_schedule`` differ; nothing where they do not."""
    changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    rates = changed.pop("learning_rate", (now["learning_rate"],) * 2)
    if not changed:
        return ""
    listed = ", ".join(f"{name} {old}, now {new}" for name, (old, new) in changed.items())
    return f"learning rate: {rates[0]:.4g} at the save, now {rates[1]:.4g} ({listed})"


def read_rates(optimizer: MegatronOptimizer) -> tuple[float, float | None]:
    """Return the learning rate of the step, and that of the vocabulary matrices where it is one of their own."""
    rate = get_canonical_lr_for_logging(optimizer.param_groups)
    decoupled = next((group["lr"] for group in optimizer.param_groups if group.get("is_decoupled_lr")), None)
    return float(rate or 0.0), decoupled


def build_schedule(
    optimizer: MegatronOptimizer, stage: StageSettings, num_steps: int, weight_decay: float
) -> OptimizerParamScheduler:
    """Return the schedule of a stage.

    Args:
        optimizer: whose groups it sets.
        stage: settings of the stage.
        num_steps: optimizer steps of the stage.
        weight_decay: the same for all steps.
    """
    settings: dict[str, Any] = {
        "init_lr": 0.0,
        "max_lr": stage.lr,
        "min_lr": stage.min_lr,
        # The engine wants the decay to end behind the warm-up, also in a stage of one step.
        "lr_warmup_steps": min(round(stage.lr_warmup_fraction * num_steps), num_steps - 1),
        "lr_decay_steps": num_steps,
        "lr_decay_style": stage.lr_decay_style,
        "start_wd": weight_decay,
        "end_wd": weight_decay,
        "wd_incr_steps": num_steps,
        "wd_incr_style": "constant",
    }
    if stage.lr_decay_style == "infinite":
        return InfiniteSchedule(optimizer, stage=stage, **settings)
    if stage.lr_decay_style == "WSD":
        settings["wsd_decay_steps"] = max(1, round(stage.lr_wsd_decay_fraction * num_steps))
        settings["lr_wsd_decay_style"] = stage.lr_wsd_decay_style
    return OptimizerParamScheduler(optimizer, **settings)

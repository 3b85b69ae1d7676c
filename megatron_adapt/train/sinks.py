"""Rows of metrics for TensorBoard and for Weights & Biases; nothing is imported that was not asked for.

A stage is a run in both. Step numbers are those of the rows, also behind a resume: TensorBoard hides what an earlier
launch wrote of later steps; Weights & Biases goes on in the run that ``wandb.json`` of the stage names and draws over
``step``, where a step that is done again after a kill stands twice.
"""

import importlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_adapt.config import TrainSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import read_json, write_json

WANDB_FILE = "wandb.json"
"In the folder of a stage: the id of its run."
_MODULES = {"tensorboard_dir": "torch.utils.tensorboard", "wandb_project": "wandb"}


class Sink(Protocol):
    """Takes rows of metrics."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a row."""

    def close(self, *, failed: bool) -> None:
        """Take no more rows."""


def check_sinks(settings: TrainSettings) -> None:
    """Refuse a sink whose package is missing, before anything is built.

    Raises:
        ConfigError: the package is not installed.
    """
    for name, module in _MODULES.items():
        if not getattr(settings, name):
            continue
        try:
            importlib.import_module(module)
        except ImportError:
            package = module.rpartition(".")[2]
            raise ConfigError(
                f"train.{name}: needs {package}, which is not installed; install the extra: pip install "
                "'megatron-adapt[log]', or leave the setting out"
            ) from None


def open_sinks(settings: TrainSettings, stage: str, root: Path, first: int, config: Mapping[str, Any]) -> list[Sink]:
    """Open the sinks that the settings name, on the main rank.

    Args:
        settings: of the run; ``check_sinks`` has passed them.
        stage: name of the stage.
        root: folder of its checkpoints.
        first: steps done before this launch; 0 begins new runs.
        config: what to show as the settings of the run.
    """
    sinks: list[Sink] = []
    if settings.tensorboard_dir is not None:
        sinks.append(TensorBoardSink(settings.tensorboard_dir / stage, first))
    if settings.wandb_project:
        name = f"{root.parent.parent.name}-{stage}"
        sinks.append(WandbSink(settings.wandb_project, name, root, first, config))
    return sinks


def flatten_row(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield name and value of every number of a row; ``tokens`` of ``ja`` is ``tokens/ja``."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from flatten_row(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


class TensorBoardSink:
    """Writes event files to a folder; each launch has a file of its own, and a later one holds."""

    def __init__(self, folder: Path, first: int) -> None:
        writer = importlib.import_module(_MODULES["tensorboard_dir"]).SummaryWriter
        # Steps from here on in older files are hidden; row 0 is written again by a stage that starts over.
        self._writer = writer(log_dir=str(folder), purge_step=first + 1 if first else 0)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write a row."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WandbSink:
    """Sends rows to a run of Weights & Biases."""

    def __init__(self, project: str, name: str, root: Path, first: int, config: Mapping[str, Any]) -> None:
        record = root / WANDB_FILE
        if first == 0 or not record.is_file():
            write_json(record, {"run_id": uuid.uuid4().hex[:12]})
        run_id = read_json(record)["run_id"]
        self._run = importlib.import_module(_MODULES["wandb_project"]).init(
            project=project, name=name, id=run_id, resume="allow", dir=str(root), config=dict(config)
        )
        # Its own counter only grows, and a resumed run may do a step again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send a row."""
        self._run.log({"step": step, **numbers})

    def close(self, *, failed: bool) -> None:
        """Say how the launch ended."""
        self._run.finish(exit_code=int(failed))

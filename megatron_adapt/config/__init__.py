"""Every setting of every stage, a file per stage. The string under a field is its ``--help``.

``...Settings`` is a table of a recipe: what a user decides. A class named like a tool adds the paths that
the tool reads and writes; on the command line both are flat flags. ``Recipe`` is a whole TOML file, read
by ``tools/adapt.py`` and ``tools/pretrain.py``.
Single values are checked here; checks against data live where the data is read.
"""

from megatron_adapt.config.base import BaseSettings, CreateBase
from megatron_adapt.config.calibration import CalibrationSettings, MakeCalibration
from megatron_adapt.config.checkpoint import (
    AverageCheckpoints,
    CheckpointSettings,
    ConvertCheckpoint,
    ExpandBlocks,
    InspectCheckpoint,
    ReleaseModel,
    StripCheckpoint,
)
from megatron_adapt.config.corpus import CorpusSettings, ParallelSettings, PrepareCorpus, PrepareParallel
from megatron_adapt.config.data import DataSettings, PreprocessData
from megatron_adapt.config.diagnose import DiagnoseVocab
from megatron_adapt.config.evaluate import Evaluate, EvaluateSettings
from megatron_adapt.config.inspect import CheckTokens, DescribeTokens, MergeTokens, ShowTokens, TraceStep
from megatron_adapt.config.layout import Layout
from megatron_adapt.config.plan_run import PlanRun
from megatron_adapt.config.propagate import PropagateEmbeddings, PropagateSettings
from megatron_adapt.config.tokenizer import BuildTokenizer, MeasureTokenizer, SweepSettings, TokenizerSettings
from megatron_adapt.config.train import StageSettings, TrainSettings
from megatron_adapt.config.vocab import ResizeVocab, VocabSettings

__all__ = [
    "AverageCheckpoints",
    "BaseSettings",
    "BuildTokenizer",
    "CalibrationSettings",
    "CheckTokens",
    "CheckpointSettings",
    "ConvertCheckpoint",
    "CorpusSettings",
    "CreateBase",
    "DataSettings",
    "DescribeTokens",
    "DiagnoseVocab",
    "Evaluate",
    "EvaluateSettings",
    "ExpandBlocks",
    "InspectCheckpoint",
    "Layout",
    "MakeCalibration",
    "MeasureTokenizer",
    "MergeTokens",
    "ParallelSettings",
    "PlanRun",
    "PrepareCorpus",
    "PrepareParallel",
    "PreprocessData",
    "PropagateEmbeddings",
    "PropagateSettings",
    "ReleaseModel",
    "ResizeVocab",
    "ShowTokens",
    "StageSettings",
    "StripCheckpoint",
    "SweepSettings",
    "TokenizerSettings",
    "TraceStep",
    "TrainSettings",
    "VocabSettings",
]

"""Settings of the train stage."""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of training (``[[train.stages]]``); each starts from the weights of the one before."""

    name: str
    "Name of the stage; its checkpoints go to checkpoints/NAME."
    tokens: int
    "Tokens to train on; rounded up to whole steps."
    blend: dict[str, float]
    "Share of tokens per language; the shares are divided by their sum."
    trainable: Literal["embeddings", "all"] = "all"
    "embeddings: input embedding and output head only; all: every parameter."
    lr: float = 1e-4
    "Peak learning rate."
    min_lr: float = 0.0
    "Learning rate of the last step, where the cosine ends."
    lr_warmup_fraction: float = 0.01
    "Share of the stage's steps over which the learning rate rises linearly."

    def __post_init__(self) -> None:
        where = f"train.stages {self.name}"
        require(self.tokens > 0, f"{where}: tokens {self.tokens} is not positive")
        require(bool(self.blend), f"{where}: blend is empty; name at least one language and its share")
        require(re.fullmatch(r"\w[\w.-]*", self.name) is not None, f"{where}: the name must be a plain word")
        for language, share in self.blend.items():
            require(share > 0, f"{where}: blend.{language} {share} is not positive; leave the language out")
        require(
            self.lr > self.min_lr >= 0,
            f"{where}: lr {self.lr} and min_lr {self.min_lr} must fall and be >= 0",
        )
        require(
            0 <= self.lr_warmup_fraction < 1,
            f"{where}: lr_warmup_fraction {self.lr_warmup_fraction} is not between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The training runs (table ``[train]``)."""

    stages: tuple[StageSettings, ...] = ()
    "The stages, in order."
    nproc_per_node: int = 1
    "Ranks that tools/adapt.py starts with torchrun; a launch of tools/pretrain.py decides for itself."
    tensor_model_parallel_size: int = 1
    "Ranks that share every matrix."
    pipeline_model_parallel_size: int = 1
    "Ranks that share the layers."
    sequence_parallel: bool = False
    "Split norms and residuals over the tensor-parallel ranks along the sequence."
    use_distributed_optimizer: bool = True
    "Split the optimizer state over the data-parallel ranks."
    seq_length: int = 512
    "Tokens in a window."
    micro_batch_size: int = 4
    "Windows in one forward pass of a rank."
    global_batch_size: int = 16
    "Windows in one optimizer step of the whole job."
    bf16: bool = True
    "Train in bfloat16 with fp32 master weights; otherwise in fp32."
    adam_beta1: float = 0.9
    "Decay of Adam's first moment."
    adam_beta2: float = 0.95
    "Decay of Adam's second moment."
    adam_eps: float = 1e-8
    "Epsilon of Adam."
    weight_decay: float = 0.1
    "Weight decay of matrices; norms have none."
    clip_grad: float = 1.0
    "Largest norm of the gradient."
    seed: int = 1234
    "Seed of the data order."
    log_interval: int = 10
    "Steps between two lines of metrics."
    save_interval: int = 500
    "Steps between two checkpoints; the last step is always saved."
    eval_interval: int = 100
    "Steps between two validations; the first and last step are always validated."
    eval_windows: int = 64
    "Validation windows per language, always the same ones."
    stop_after_steps: int = 0
    "Save and stop cleanly after this many steps of this launch; 0 runs to the end of the stage."

    def __post_init__(self) -> None:
        positive = (
            "nproc_per_node tensor_model_parallel_size pipeline_model_parallel_size seq_length micro_batch_size "
            "global_batch_size log_interval save_interval eval_interval eval_windows"
        )
        for name in positive.split():
            require(getattr(self, name) >= 1, f"train.{name}: {getattr(self, name)} is below 1")
        require(self.stop_after_steps >= 0, f"train.stop_after_steps: {self.stop_after_steps} is below 0")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"train.stages: a name occurs twice in {names}; rename one")

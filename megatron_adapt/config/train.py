"""Settings of the train stage."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from megatron_adapt.config.layout import Layout
from megatron_adapt.config.names import get_language
from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of training (``[[train.stages]]``); each starts from the weights of the one before."""

    name: str
    "Name of the stage; its checkpoints go to checkpoints/NAME."
    tokens: int
    "Tokens to train on; rounded up to whole steps."
    blend: dict[str, float]
    "Share of tokens per language: shares that sum to 1, or parts of at least 1 each, such as 9 and 1."
    within: Literal["size", "weight", "temperature"] = "size"
    "How sources share their language: size, by the tokens they hold; weight; temperature, by tokens ** (1 / it)."
    weights: dict[str, float] = field(default_factory=dict)
    "Share of its language's tokens per source, by the rule of blend; sources it does not name are not read."
    temperature: float = 1.0
    "For within = temperature: 1 is by size, larger ones lean to equal parts (Arivazhagan et al. 2019 use 5)."
    max_epochs: dict[str, float] = field(default_factory=dict)
    "How often a language or a source may be read, with what the stages before have read; empty: as often as asked."
    shortfall: Literal["fail", "redistribute", "cap"] = "fail"
    "Where max_epochs allows too little: fail; redistribute, others grow and the budget stays; cap, the budget shrinks."
    continue_blend: bool = True
    "Begin each source where the stages before stopped reading it; otherwise read it in a new order from its start."
    trainable: Literal["embeddings", "new_rows", "expanded_blocks", "all"] | tuple[str, ...] = "all"
    """embeddings: input embedding and output head only. new_rows: of these the rows of new tokens only, without weight
    decay. expanded_blocks: blocks that tools/reshape_checkpoint.py expand added. all: every parameter. Or patterns of
    parameter names, such as decoder.layers.*.mlp.* and embedding.*; layers count from 0."""
    objective: Literal["language_modeling", "token_distillation"] = "language_modeling"
    """language_modeling: predict the next token. token_distillation: input rows of new tokens learn the hidden states
    that their old pieces give (Dobler et al. 2025); with trainable = new_rows."""
    distillation_layer: int = -1
    "Layer whose hidden states token_distillation compares: -1 the last, behind the final norm; early ones cost less."
    rampup_batch_size: tuple[int, ...] = ()
    """Begin with smaller batches: START INCREMENT SAMPLES. The batch grows by INCREMENT windows, from START to
    global_batch_size, over the first SAMPLES windows; the shares of the learning rate are then of windows."""
    carry_optimizer: bool = False
    "Begin with the moments and fp32 masters of the checkpoint the stage starts from, too; the same parameters learn."
    lr: float = 1e-4
    "Peak learning rate."
    min_lr: float = 0.0
    "Learning rate of the last step, where the decay ends."
    decoupled_lr: float | None = None
    "Peak learning rate of input embedding and output head; without it they learn with lr."
    decoupled_min_lr: float | None = None
    "Their learning rate of the last step; without it min_lr."
    lr_warmup_fraction: float = 0.01
    "Share of the stage's steps over which the learning rate rises linearly."
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD", "infinite"] = "cosine"
    """What follows the warm-up. cosine, linear: down to min_lr. constant: no decay. WSD: constant, then down to min_lr.
    infinite: down to lr_constant, constant, then down to min_lr (Ibrahim et al. 2024)."""
    lr_wsd_decay_fraction: float = 0.1
    "Share of the stage's steps, its last ones, over which WSD and infinite fall to min_lr."
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    "How WSD falls; infinite falls exponentially."
    lr_cooldown_fraction: float = 0.1
    "Share of the stage's steps over which infinite falls from lr to lr_constant."
    lr_constant: float = 0.0
    "Learning rate that infinite keeps."

    def __post_init__(self) -> None:
        where = f"train.stages {self.name}"
        require(self.tokens > 0, f"{where}: tokens {self.tokens} is not positive")
        require(bool(self.blend), f"{where}: blend is empty; name at least one language and its share")
        require(re.fullmatch(r"\w[\w.-]*", self.name) is not None, f"{where}: the name must be a plain word")
        _check_ratio(where, "blend", self.blend, "language")
        self._check_sources(where)
        require(
            not self.rampup_batch_size or (len(self.rampup_batch_size) == 3 and min(self.rampup_batch_size) >= 1),
            f"{where}: rampup_batch_size {list(self.rampup_batch_size)} is not three numbers from 1; give START, "
            "INCREMENT and SAMPLES",
        )
        self._check_trainable(where)
        self._check_objective(where)
        self._check_schedule(where)
        require(
            self.lr > self.min_lr >= 0,
            f"{where}: lr {self.lr} and min_lr {self.min_lr} must fall and be >= 0",
        )
        self._check_decoupled(where)

    @property
    def learning(self) -> str:
        """What learns, in words."""
        return self.trainable if isinstance(self.trainable, str) else ", ".join(self.trainable)

    @property
    def decoupled_last_lr(self) -> float:
        """Learning rate of the vocabulary matrices in the last step."""
        return self.min_lr if self.decoupled_min_lr is None else self.decoupled_min_lr

    def _check_trainable(self, where: str) -> None:
        """Refuse names that are neither a word of the table nor a pattern; the model is not known here."""
        if isinstance(self.trainable, str):
            return
        require(bool(self.trainable), f"{where}: trainable is empty; name what learns, or leave it out for all")
        for pattern in self.trainable:
            require(
                "." in pattern or "*" in pattern,
                f"{where}: trainable {pattern!r} is neither embeddings, new_rows, expanded_blocks or all, alone, nor a "
                "pattern of parameter names such as decoder.layers.*.mlp.*; correct it",
            )

    def _check_decoupled(self, where: str) -> None:
        """Refuse learning rates of the vocabulary matrices that do not fall, or have no effect."""
        peak, last = self.decoupled_lr, self.decoupled_last_lr
        require(
            peak is not None or self.decoupled_min_lr is None,
            f"{where}: decoupled_min_lr {self.decoupled_min_lr} has no effect without decoupled_lr; add it",
        )
        if peak is None:
            return
        require(peak > last >= 0, f"{where}: decoupled_lr {peak} and its lowest rate {last} must fall and be >= 0")
        require(
            self.decoupled_min_lr is None or self.lr_decay_style != "constant",
            f"{where}: decoupled_min_lr {last} has no effect with lr_decay_style constant; leave it out",
        )
        # ``infinite`` falls to lr_constant in the proportion of the peaks.
        constant = self.lr_constant / self.lr * peak
        require(
            self.lr_decay_style != "infinite" or constant > last > 0,
            f"{where}: decoupled_lr {peak} stays at {constant:g}, in the proportion of lr_constant to lr; that must be "
            f"above its lowest rate {last}, and this above 0; set decoupled_min_lr",
        )

    def _check_objective(self, where: str) -> None:
        """Refuse an objective that does not fit what learns."""
        distils = self.objective == "token_distillation"
        require(
            not distils or self.trainable == "new_rows",
            f'{where}: objective = "token_distillation" trains rows of new tokens alone, trainable is '
            f'"{self.trainable}"; set it to "new_rows"',
        )
        require(
            distils or self.distillation_layer == -1,
            f'{where}: distillation_layer has no effect without objective = "token_distillation"; add it',
        )
        require(
            self.distillation_layer == -1 or self.distillation_layer >= 1,
            f"{where}: distillation_layer {self.distillation_layer} is no layer; use 1 or more, or -1 for the last",
        )

    def _check_schedule(self, where: str) -> None:
        """Refuse shares that do not fit into a stage, and settings that have no effect."""
        style = self.lr_decay_style
        read_by = {
            "lr_wsd_decay_fraction": ("WSD", "infinite"),
            "lr_wsd_decay_style": ("WSD",),
            "lr_cooldown_fraction": ("infinite",),
            "lr_constant": ("infinite",),
            "min_lr": ("cosine", "linear", "WSD", "infinite"),
        }
        for item in fields(self):
            styles, value = read_by.get(item.name, (style,)), getattr(self, item.name)
            require(
                value == item.default or style in styles,
                f"{where}: {item.name} {value} has no effect with lr_decay_style {style}; leave it out, or use "
                f"{' or '.join(styles)}",
            )
        if style == "infinite":
            require(
                self.lr > self.lr_constant > self.min_lr > 0,
                f"{where}: lr {self.lr}, lr_constant {self.lr_constant} and min_lr {self.min_lr} must fall and be > 0",
            )
        shares = {"lr_warmup_fraction": self.lr_warmup_fraction}
        shares |= {"lr_wsd_decay_fraction": self.lr_wsd_decay_fraction} if style in ("WSD", "infinite") else {}
        shares |= {"lr_cooldown_fraction": self.lr_cooldown_fraction} if style == "infinite" else {}
        for name, share in shares.items():
            require(0 <= share < 1, f"{where}: {name} {share} is not between 0 and 1")
        require(
            sum(shares.values()) <= 1,
            f"{where}: {' + '.join(shares)} is {sum(shares.values()):g}; use at most 1 in all",
        )

    def _check_sources(self, where: str) -> None:
        """Refuse wrong values of what splits a language over its sources, and such that have no effect."""
        by_weight, by_temperature = self.within == "weight", self.within == "temperature"
        require(by_weight or not self.weights, f'{where}: weights have no effect without within = "weight"; add it')
        require(bool(self.weights) or not by_weight, f'{where}: within = "weight" needs weights; name the sources')
        for language in dict.fromkeys(map(get_language, self.weights)):
            own = {source: weight for source, weight in self.weights.items() if get_language(source) == language}
            _check_ratio(where, "weights", own, "source", f" of {language}")
        require(
            math.isfinite(self.temperature) and self.temperature >= 1,
            f"{where}: temperature {self.temperature} is no number from 1; 1 is by size, 5 is usual",
        )
        require(
            by_temperature or self.temperature == 1,
            f'{where}: temperature has no effect without within = "temperature"; add it',
        )
        for name, epochs in self.max_epochs.items():
            require(
                math.isfinite(epochs) and epochs > 0,
                f"{where}: max_epochs.{name} {epochs} is not positive; leave it out for no limit",
            )
        require(
            bool(self.max_epochs) or self.shortfall == "fail",
            f'{where}: shortfall = "{self.shortfall}" has no effect without max_epochs; add them',
        )


def _check_ratio(where: str, setting: str, ratio: Mapping[str, float], what: str, of: str = "") -> None:
    """Refuse a ratio with a part that is not positive, or one that is neither shares nor parts."""
    for name, part in ratio.items():
        require(part > 0, f"{where}: {setting}.{name} {part} is not positive; leave the {what} out")
    total = math.fsum(ratio.values())
    is_ratio = abs(total - 1) <= 1e-6 or (math.isfinite(total) and min(ratio.values()) >= 1)
    require(
        is_ratio,
        f"{where}: {setting}{of}: the sum is {total:.7g}; give shares that sum to 1, or parts of at least 1 each",
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Layout):
    """The training runs (table ``[train]``)."""

    stages: tuple[StageSettings, ...] = ()
    "The stages, in order."
    nproc_per_node: int = 1
    "Ranks that tools/adapt.py starts with torchrun; a launch of tools/pretrain.py decides for itself."
    seq_length: int = 512
    "Tokens in a window."
    micro_batch_size: int = 4
    "Windows in one forward pass of a rank."
    global_batch_size: int = 16
    "Windows in one optimizer step of the whole job."
    reset_attention_mask: bool = False
    "Keep attention inside a document, in training and validation; RoPE needs no reset of positions besides."
    bf16: bool = True
    "Train in bfloat16 with fp32 master weights; otherwise in fp32."
    adam_beta1: float = 0.9
    "Decay of Adam's first moment."
    adam_beta2: float = 0.95
    "Decay of Adam's second moment."
    adam_eps: float = 1e-8
    "Epsilon of Adam."
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of Adam's first moment between steps. bf16: two bytes a value less, rounded at random so that its mean is
    right; another layout then differs by that noise."""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    "Type of Adam's second moment between steps, in the same way."
    weight_decay: float = 0.1
    "Weight decay of matrices; norms have none."
    clip_grad: float = 1.0
    "Largest norm of the gradient."
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's sum of exponentials, learned beside the loss (Chowdhery et al.
    2022 use 1e-4); 0 is none. Losses are reported without it; token distillation has no softmax."""
    seed: int = 1234
    "Seed of the data order."
    blend_engine: Literal["adapt", "megatron"] = "adapt"
    "Who orders the windows: adapt, in exact shares; megatron, megatron-core's builder, to repeat an older run."
    align_documents: bool = False
    "Begin every window at a document, or inside one longer than it; what is read twice for it bears loss once."
    continue_blend: bool = False
    "Go on with a changed plan, behind all that was read of each source; otherwise a changed plan is refused."
    log_interval: int = 10
    "Steps between two lines of metrics."
    save_interval: int = 500
    "Steps between two checkpoints; the last step is always saved."
    async_save: bool = False
    "Train on while a checkpoint is written, by another process of every rank; needs host memory for a copy of it."
    keep_last: int = 0
    "Checkpoints of a stage that stay, the last ones; 0 keeps all."
    save_retain_interval: int = 0
    "With keep_last, checkpoints of steps that are multiples of this stay too; 0 is none."
    verify_checkpoint: bool = True
    "Compare SHA-256 of every file of a checkpoint before it is loaded, each rank its share; sizes always are."
    eval_interval: int = 100
    "Steps between two validations; the first and last step are always validated."
    eval_windows: int = 64
    "Validation windows per language, always the same ones."
    stop_after_steps: int = 0
    "Save and stop cleanly after this many steps of this launch; 0 runs to the end of the stage."
    exit_duration_in_mins: float = 0.0
    "Save and stop cleanly after the step in which a launch has trained this long; 0 is no limit."
    max_skipped_steps: int = 10
    "Steps in a row that may be left out because loss or gradient is not finite; 0 stops the run at the first."
    loss_spike_factor: float = 6.0
    "Report a step whose loss lies this many robust standard deviations above the last ones; 0 reports none."
    step_timeout_in_mins: float = 10.0
    "End a rank with the stacks of its threads when nothing has moved for this long; 0 waits forever."
    eod_mask_loss: bool = False
    "Leave the first token of a document out of the loss where it is predicted from the document before."
    tensorboard_dir: Path | None = None
    "Also write the metrics here for TensorBoard, a run per stage."
    wandb_project: str = ""
    "Also send the metrics to this project of Weights & Biases, a run per stage; its own variables (WANDB_...) say how."
    device_hour_price: float = 0.0
    "What a device costs an hour; with it the metrics say what the rest of the stage costs. 0 leaves that out."

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = (
            "nproc_per_node seq_length micro_batch_size global_batch_size log_interval save_interval eval_interval "
            "eval_windows"
        )
        for name in positive.split():
            require(getattr(self, name) >= 1, f"train.{name}: {getattr(self, name)} is below 1")
        require(
            self.adam_eps > 0,
            f"train.adam_eps: {self.adam_eps} is not positive, and what has no gradient is divided by it; use 1e-8",
        )
        require(
            math.isfinite(self.z_loss) and self.z_loss >= 0,
            f"train.z_loss: {self.z_loss} is no number from 0; 1e-4 is usual, 0 is none",
        )
        limits = "stop_after_steps exit_duration_in_mins device_hour_price keep_last save_retain_interval"
        for name in f"{limits} max_skipped_steps step_timeout_in_mins".split():
            require(getattr(self, name) >= 0, f"train.{name}: {getattr(self, name)} is below 0")
        require(
            self.keep_last > 0 or not self.save_retain_interval,
            f"train.save_retain_interval: {self.save_retain_interval} has no effect without keep_last; add it",
        )
        require(
            self.save_retain_interval % self.save_interval == 0,
            f"train.save_retain_interval: {self.save_retain_interval} is not a multiple of save_interval "
            f"{self.save_interval}; make it one",
        )
        factor = self.loss_spike_factor
        require(
            math.isfinite(factor) and (factor == 0 or factor >= 1),
            f"train.loss_spike_factor: {factor} is no number from 1; 6 is usual, 0 reports nothing",
        )
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"train.stages: a name occurs twice in {names}; rename one")

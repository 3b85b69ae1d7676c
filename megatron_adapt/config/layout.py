"""How a training run is spread over ranks and memory: but for FP8, settings that change no loss beyond rounding."""

from dataclasses import dataclass
from typing import Literal

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is spread over the ranks; data parallelism takes the ranks that are left."""

    tensor_model_parallel_size: int = 1
    "Ranks that share every matrix."
    pipeline_model_parallel_size: int = 1
    "Ranks that share the layers."
    virtual_pipeline_model_parallel_size: int = 1
    "Parts of the layers that a pipeline rank holds; more of them shorten its waits and send more."
    num_layers_in_first_pipeline_stage: int = 0
    "Layers of the first pipeline rank, which also holds the embedding; 0: as many as the others."
    num_layers_in_last_pipeline_stage: int = 0
    "Layers of the last pipeline rank, which also holds the head and the loss; 0: as many as the others."
    context_parallel_size: int = 1
    "Ranks that share the positions of a window."
    sequence_parallel: bool = False
    "Split norms and residuals over the tensor-parallel ranks along the sequence."
    use_distributed_optimizer: bool = True
    "Split the optimizer state over the data-parallel ranks."
    overlap_grad_reduce: bool = False
    "Reduce gradients over the data-parallel ranks while others are still computed."
    overlap_param_gather: bool = False
    "Gather the weights that the distributed optimizer has split while the next forward pass runs."
    ddp_bucket_size: int = 0
    "Values whose gradients are reduced together under overlap_grad_reduce; 0: as the engine chooses, 40 million up."
    recompute_granularity: Literal["none", "full", "selective"] = "none"
    """Activations that are computed anew in the backward pass. full: whole layers. selective: recompute_modules."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """For full. uniform: keep what enters every recompute_num_layers layers. block: recompute the first
    recompute_num_layers of each part of the model, keep all of the others."""
    recompute_num_layers: int = 1
    "For full, see recompute_method."
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ()
    "For selective: parts of a layer. The flash kernels behind core_attn keep little anyway."
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    "local: megatron-core's layers on torch's attention and norm. transformer_engine: its layers; must be installed."
    fp8: Literal["none", "e4m3", "hybrid"] = "none"
    """Type of what the products of the layers multiply, in Transformer Engine, on a GPU that has it. e4m3: all.
    hybrid: gradients of activations in e5m2, which reaches further. Changes the loss, as it rounds more than bf16."""
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """What shares a scale: a tensor (compute capability 8.9 up), blocks of it (9.0), 32 values of it (10.0). Delayed
    scaling is left out: its scales are those of steps before, and checkpoints do not hold them."""

    kernels: Literal["auto", "torch", "triton"] = "auto"
    "Kernels beside those of the layers: Triton's, or their torch twins; auto: Triton's on a GPU where it is installed."

    def __post_init__(self) -> None:
        sizes = "tensor_model pipeline_model virtual_pipeline_model context".split()
        for name in [f"{size}_parallel_size" for size in sizes] + ["recompute_num_layers"]:
            require(getattr(self, name) >= 1, f"train.{name}: {getattr(self, name)} is below 1")
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "ddp_bucket_size"):
            require(getattr(self, name) >= 0, f"train.{name}: {getattr(self, name)} is below 0")
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "train.overlap_param_gather: needs use_distributed_optimizer and overlap_grad_reduce; switch them on",
        )
        require(
            not self.ddp_bucket_size or self.overlap_grad_reduce,
            "train.ddp_bucket_size: has no effect without overlap_grad_reduce; leave it out",
        )
        full, selective = self.recompute_granularity == "full", self.recompute_granularity == "selective"
        require(
            full or (self.recompute_method, self.recompute_num_layers) == ("uniform", 1),
            'train.recompute_method: has, like recompute_num_layers, no effect without recompute_granularity = "full"',
        )
        require(
            selective == bool(self.recompute_modules),
            f"train.recompute_modules: {list(self.recompute_modules)} with recompute_granularity "
            f'"{self.recompute_granularity}"; name modules for "selective", and only for it',
        )

        require(
            self.fp8 == "none" or self.transformer_impl == "transformer_engine",
            f'train.fp8: "{self.fp8}" runs in Transformer Engine alone; add transformer_impl = "transformer_engine", '
            'or use "none"',
        )
        require(
            self.fp8 != "none" or self.fp8_recipe == "tensorwise",
            f'train.fp8_recipe: "{self.fp8_recipe}" has no effect with fp8 = "none"; leave it out',
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model, or of the positions of a window."""
        sizes = self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size
        return sizes[0] * sizes[1] * sizes[2]

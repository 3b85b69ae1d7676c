"""LlamaShape to a megatron-core ``GPTModel``: the same arithmetic as transformers' ``LlamaForCausalLM``.

Four things differ from the engine's defaults: norm, core attention and gate are ours (``norm``, ``attention``,
``swiglu``), RoPE too where Triton's kernels run (``rope``); the llama3 frequency scaling takes all four of its
numbers, where the engine assumes 8192 original positions; head and loss are one (``kernels.linear_cross_entropy``),
with a z-loss where one is asked for; and columns that pad the vocabulary take no part in it.
Weights are left uninitialised: they always come from a checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_adapt.config import Layout
from megatron_adapt.engine import rope
from megatron_adapt.engine.attention import SDPACoreAttention
from megatron_adapt.engine.fp8 import check_fp8
from megatron_adapt.engine.kernels.dispatch import Implementation, choose_kernels
from megatron_adapt.engine.kernels.linear_cross_entropy import Columns, linear_cross_entropy
from megatron_adapt.engine.norm import RMSNorm
from megatron_adapt.engine.parallel import get_device
from megatron_adapt.engine.swiglu import SwiGLU
from megatron_adapt.errors import EngineError
from megatron_adapt.shape import LlamaShape


class LlamaModel(GPTModel):  # type: ignore[misc]
    """A ``GPTModel`` that computes losses without logits, over the true vocabulary."""

    true_vocab_size: int
    kernels: Implementation = "torch"
    z_loss: float = 0.0
    "Weight of the z-loss, whose gradient goes with that of the loss."

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the loss of every token; without ``labels``, or on an earlier stage, what the engine returns.

        Args:
            hidden_states: [T, B, H], under sequence parallelism this rank's part of T.
            args: of the engine.
            labels: [B, T] token ids.
            loss_mask: [B, T], zero where a token bears no loss: its loss is 0 and costs nothing.
            kwargs: of the engine.

        Returns:
            [B, T] losses in nats over the true vocabulary, fp32. Where ``z_loss`` is not 0 the value is still the
            cross entropy, to be reported, and the gradient is that of cross entropy and z-loss: the engine's schedule
            takes one tensor, and megatron-core hands on the auxiliary losses of its routers in the same way.
        """
        if labels is None or not self.post_process:
            states: torch.Tensor = super()._postprocess(
                hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs
            )
            return states
        # The layer itself is passed by, and with it the hook in which the engine waits for weights that it gathers.
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        tied = self.share_embeddings_and_output_weights
        weight_VH = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        # As the engine's ColumnParallelLinear: ranks share the tokens, or the gradient, of a column-parallel product.
        share = copy_to_tensor_model_parallel_region
        if self.config.sequence_parallel:
            share = gather_from_sequence_parallel_region
        loss_N, z_loss_N = linear_cross_entropy(
            share(hidden_states, group=self.tp_group).flatten(0, 1),
            weight_VH,
            labels.t().flatten(),
            self._get_columns(len(weight_VH)),
            loss_mask_N=None if loss_mask is None else loss_mask.t().flatten(),
            weight_sums_VH=_find_sums(weight_VH),
            z_loss=self.z_loss,
            kernels=self.kernels,
        )
        if self.z_loss:
            loss_N = loss_N + (z_loss_N - z_loss_N.detach())
        return loss_N.view(labels.shape[::-1]).t().contiguous()

    def _get_columns(self, num_rows: int) -> Columns:
        """Return the part of the vocabulary that this tensor-parallel rank holds."""
        first = self.tp_group.rank() * num_rows
        num_true = min(max(self.true_vocab_size - first, 0), num_rows)
        return Columns(first=first, num_true=num_true, group=self.tp_group if self.tp_group.size() > 1 else None)

    def compute_hidden_states(
        self, ids_BT: torch.Tensor, layer: int, documents: PackedSeqParams | None = None
    ) -> torch.Tensor:
        """Return what comes out of a layer, on a rank that holds all layers; neither later ones nor the head are run.

        Args:
            ids_BT: token ids.
            layer: from 1; -1 is the last one, behind the final norm.
            documents: where attention starts anew (``pack_documents``).

        Returns:
            [T, B, H], whole on every tensor-parallel rank.
        """
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        with self._end_at(layer):
            states_TBH: torch.Tensor = self(ids_BT, positions_BT, None, packed_seq_params=documents)
        if self.config.sequence_parallel:
            # What follows is the same on every rank, so the gradient is cut and not summed.
            states_TBH = gather_from_sequence_parallel_region(states_TBH, tensor_parallel_output_grad=False)
        return states_TBH

    @contextmanager
    def _end_at(self, layer: int) -> Iterator[None]:
        """Let a forward pass end behind a layer: a ``GPTModel`` without ``post_process`` returns hidden states."""
        decoder = self.decoder
        layers, norm = decoder.layers, decoder.final_layernorm
        self.post_process = False
        if layer != -1:
            decoder.layers, decoder.final_layernorm = layers[:layer], None
        try:
            yield
        finally:
            self.post_process = True
            decoder.layers, decoder.final_layernorm = layers, norm


def build_chunks(
    shape: LlamaShape, *, padded_vocab_size: int, layout: Layout, seq_length: int, bf16: bool, z_loss: float = 0.0
) -> list[LlamaModel]:
    """Build the parts of the model that this rank holds, with uninitialised weights.

    Args:
        shape: the model; its ``vocab_size`` is the true vocabulary.
        padded_vocab_size: rows of the embedding and head matrices over all tensor-parallel ranks.
        layout: must equal the layout the engine was started with.
        seq_length: longest sequence.
        bf16: bfloat16 weights, otherwise fp32.
        z_loss: weight of the z-loss.

    Returns:
        One part, or under a virtual pipeline several, in the order of their layers.

    Raises:
        EngineError: Transformer Engine, FP8 or Triton was asked for, and it or what it runs on is missing.
    """
    check_fp8(layout)
    kernels = choose_kernels(layout.kernels)
    config = _make_config(shape, layout, bf16, kernels)
    num_chunks = layout.virtual_pipeline_model_parallel_size
    numbers = range(num_chunks) if num_chunks > 1 else [None]
    chunks = [_build_chunk(shape, config, layout, padded_vocab_size, seq_length, number, kernels) for number in numbers]
    for chunk in chunks:
        chunk.z_loss = z_loss
    return chunks


def build_model(
    shape: LlamaShape, *, padded_vocab_size: int, layout: Layout, seq_length: int, bf16: bool
) -> LlamaModel:
    """Build the one part that a rank holds without a virtual pipeline, as ``build_chunks``."""
    (model,) = build_chunks(shape, padded_vocab_size=padded_vocab_size, layout=layout, seq_length=seq_length, bf16=bf16)
    return model


def _build_chunk(
    shape: LlamaShape,
    config: TransformerConfig,
    layout: Layout,
    padded_vocab_size: int,
    seq_length: int,
    number: int | None,
    kernels: Implementation,
) -> LlamaModel:
    """Build one part of the model; ``number`` is that of a virtual pipeline."""
    model = LlamaModel(
        config=config,
        transformer_layer_spec=_make_block(config, layout, number, kernels),
        vocab_size=padded_vocab_size,
        max_sequence_length=seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        vp_stage=number,
    )
    model.true_vocab_size = shape.vocab_size
    model.kernels = kernels
    if shape.rope_scaling is not None:
        scaling = shape.rope_scaling
        embedding = model.rotary_pos_emb
        embedding.inv_freq = embedding._apply_scaling(
            embedding.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        )
    _mark_split_weights(model)
    model.to(get_device())
    return model


def _make_block(
    config: TransformerConfig, layout: Layout, number: int | None, kernels: Implementation
) -> TransformerBlockSubmodules:
    """Name the classes of the layers of one part of the model."""
    if layout.transformer_impl == "transformer_engine":
        if not HAVE_TE:
            raise EngineError(
                'train.transformer_impl: "transformer_engine" is not installed here; install the extra gpu '
                '(pip install "megatron_adapt[gpu]"), or use "local"'
            )
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=number)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    norm = ModuleSpec(module=RMSNorm, params={"kernels": kernels})
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    layer.submodules.mlp.submodules.activation_func = ModuleSpec(module=SwiGLU, params={"kernels": kernels})
    num_layers = get_num_layers_to_build(config, vp_stage=number)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _mark_split_weights(model: LlamaModel) -> None:
    """Mark the weights that tensor-parallel ranks share.

    The engine marks them while it initialises them and not otherwise; unmarked, all ranks but the first leave them
    out of the gradient norm, and clipping depends on the layout.
    """
    split_axis = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        if type(module) in split_axis and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, split_axis[type(module)], 1)


def _make_config(shape: LlamaShape, layout: Layout, bf16: bool, kernels: Implementation) -> TransformerConfig:
    dtype = torch.bfloat16 if bf16 else torch.float32
    is_local = layout.transformer_impl == "local"
    if is_local and kernels == "triton":
        rope.install()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.context_parallel_size,
        **_split_pipeline(layout),
        **_choose_recompute(layout),
        fp8=None if layout.fp8 == "none" else layout.fp8,
        fp8_recipe=layout.fp8_recipe,
        finalize_model_grads_func=finalize_model_grads,
        calculate_per_token_loss=True,
        # With it the engine builds the activation that the layer spec names (``swiglu``), whosever that is.
        use_te_activation_func=is_local,
        apply_rope_fusion=is_local and kernels == "triton",
        # Kernels of Apex and Transformer Engine, which are not required.
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )


def _find_sums(weight: Any) -> torch.Tensor | None:
    """Return the engine's sum of the gradients of a weight that learns, and tell it that they will be added there.

    They may be added before the backward pass: losses are summed over tokens (``calculate_per_token_loss``) and scaled
    behind it, so the gradient of each is 1.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad and hasattr(weight, "main_grad")):
        return None
    weight.grad_added_to_main_grad = True
    sums: torch.Tensor = weight.main_grad
    return sums


def _split_pipeline(layout: Layout) -> dict[str, Any]:
    """Return what the engine's config says of pipeline stages."""
    chunks = layout.virtual_pipeline_model_parallel_size
    return {
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "num_layers_in_first_pipeline_stage": layout.num_layers_in_first_pipeline_stage or None,
        "num_layers_in_last_pipeline_stage": layout.num_layers_in_last_pipeline_stage or None,
        # Of two pipeline ranks each is before and behind the other; in one batch the engine mixes up what they send
        # each other for different chunks, and the losses are wrong without an error.
        "overlap_p2p_comm": chunks > 1,
        "batch_p2p_comm": chunks == 1,
    }


def _choose_recompute(layout: Layout) -> dict[str, Any]:
    """Return what the engine's config says of activations that are computed anew."""
    if layout.recompute_granularity == "none":
        return {}
    if layout.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(layout.recompute_modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": layout.recompute_method,
        "recompute_num_layers": layout.recompute_num_layers,
    }

"""Core attention for megatron-core's local layers on torch's scaled dot product attention.

Grouped queries, causal, no matrix of scores in memory: on a CPU about 3 times as fast as the engine's own core
attention at 1024 positions, with a tenth of the memory (``benchmarks/attention.py``); on a GPU torch chooses by itself
between flash attention, cuDNN's and its own, and no choice is forced on it here.

Attention inside documents (``pack_documents``) has no mask: that is a [B, T, T] tensor and hides scores that were
computed all the same. On a GPU, below fp32, all documents of a micro-batch are one call of torch's ``varlen_attn``, a
flash attention that knows where documents begin; elsewhere each is a call of its own. What that costs is in
``README.md``; on a GPU neither was measured.

The documents travel as megatron-core's ``PackedSeqParams``, which every layer hands to its attention, recomputed or
not. Positions are not reset: RoPE turns query and key by their places, a score depends on the distance alone, and
inside a document the distance is the same wherever it begins in the window.

A window may be shared by C ranks (``context_parallel_size``). Each then has two pieces of 2C, the r-th from the front
and the r-th from the back, so that all have as much to attend to; keys and values of the whole window are gathered.

Shapes: T positions, B batch, N query heads, G key-value heads, D head width.
"""

import inspect
import math

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from megatron_adapt.engine.parallel import get_device

try:
    from torch.nn.attention.varlen import varlen_attn

    # Older ones know neither fewer key-value heads nor windows, of which causal attention is one.
    _HAS_VARLEN = {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
except ImportError:
    _HAS_VARLEN = False


def pack_documents(cu_seqlens: torch.Tensor, seq_length: int) -> PackedSeqParams:
    """Say where documents lie in a micro-batch, for ``GPTModel.forward(packed_seq_params=...)``.

    Args:
        cu_seqlens: [documents + 1] first token of each document among the B * T tokens of the micro-batch, window
            after window, and B * T; on the CPU, because lengths are read on the host. A window begins a document.
        seq_length: T, for which the engine makes the table of rotary embeddings.
    """
    return PackedSeqParams(
        # Not "thd": the windows keep their batch axis, and with it the shapes that a pipeline sends.
        qkv_format="sbhd",
        # One for the host, which reads lengths, and one for a kernel.
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens.to(get_device(), torch.int32),
        # The longest document; the engine takes the higher of the two for its table.
        max_seqlen_q=int(cu_seqlens.diff().max()),
        max_seqlen_kv=seq_length,
    )


class SDPACoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention of the heads of this tensor-parallel rank."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.num_sharing = config.context_parallel_size

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [T, B, N, D].
            key: [T, B, G, D].
            value: [T, B, G, D].
            attention_mask: unused; what a query sees follows from its place and its document.
            attn_mask_type: always causal here.
            attention_bias: unused by Llama models.
            packed_seq_params: None, or the documents that attention stays inside (``pack_documents``).

        Returns:
            [T, B, N * D].
        """
        assert attention_mask is None
        assert attention_bias is None
        if self.num_sharing > 1:
            assert packed_seq_params is None
            return self._attend_to_window(query, key, value)
        if packed_seq_params is None:
            context_BNTD = self._attend(*(heads.permute(1, 2, 0, 3) for heads in (query, key, value)))
            return context_BNTD.permute(2, 0, 1, 3).flatten(2)
        # Window after window, as documents are counted.
        tokens = [heads.transpose(0, 1).flatten(0, 1) for heads in (query, key, value)]
        attend = self._attend_at_once if _takes_documents(query) else self._attend_one_by_one
        context = attend(tokens[0], tokens[1], tokens[2], packed_seq_params)
        return context.flatten(1).view(query.shape[1], query.shape[0], -1).transpose(0, 1).contiguous()

    def _attend_at_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedSeqParams
    ) -> torch.Tensor:
        """Attend inside all documents in one call; query [B * T, N, D], others [B * T, G, D]; returns as query."""
        begins, longest = documents.cu_seqlens_kv, documents.max_seqlen_q
        context = varlen_attn(
            query,
            key,
            value,
            begins,
            begins,
            longest,
            longest,
            scale=self.softmax_scale,
            window_size=(-1, 0),  # all that comes before
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(context, torch.Tensor)  # nothing else was asked for
        return context

    def _attend_one_by_one(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedSeqParams
    ) -> torch.Tensor:
        """Attend inside each document in a call of its own; shapes as in ``_attend_at_once``."""
        lengths = documents.cu_seqlens_q.diff().tolist()
        # One split of all tokens: the gradient of a slice would be a tensor of the whole size per document.
        parts = (heads.split_with_sizes(lengths) for heads in (query, key, value))
        contexts = [
            self._attend(*(heads.transpose(0, 1)[None] for heads in document))[0].transpose(0, 1)
            for document in zip(*parts, strict=True)
        ]
        return torch.cat(contexts)

    def _attend_to_window(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend from the two pieces of this rank to all of the window before them; shapes as in ``forward``."""
        rank = parallel_state.get_context_parallel_rank()
        keys, values = self._gather_window(key), self._gather_window(value)
        contexts = []
        for number, piece in zip((rank, 2 * self.num_sharing - 1 - rank), query.chunk(2), strict=True):
            stop = (number + 1) * len(piece)
            context_BNTD = scaled_dot_product_attention(
                piece.permute(1, 2, 0, 3),
                keys[:stop].permute(1, 2, 0, 3),
                values[:stop].permute(1, 2, 0, 3),
                attn_mask=causal_lower_right(len(piece), stop),
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
            contexts.append(context_BNTD.permute(2, 0, 1, 3).flatten(2))
        return torch.cat(contexts)

    def _gather_window(self, heads: torch.Tensor) -> torch.Tensor:
        """Gather the pieces of all ranks, [T / C, B, G, D] each, into a window [T, B, G, D] in its order."""
        num_pieces = 2 * self.num_sharing
        pieces = gather_from_sequence_parallel_region(
            heads, group=parallel_state.get_context_parallel_group()
        ).chunk(num_pieces)  # fmt: skip
        front = [pieces[2 * number] for number in range(self.num_sharing)]
        back = [pieces[2 * number + 1] for number in reversed(range(self.num_sharing))]
        return torch.cat(front + back)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend causally; query [B, N, T, D], key and value [B, G, T, D]; returns [B, N, T, D]."""
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
        )


def _takes_documents(query: torch.Tensor) -> bool:
    """Tell whether torch's flash attention takes these heads and knows documents: on a GPU, in bf16 or fp16."""
    width = query.shape[-1]
    is_narrow = query.dtype in (torch.bfloat16, torch.float16)
    return _HAS_VARLEN and query.is_cuda and is_narrow and width % 8 == 0 and width <= 256

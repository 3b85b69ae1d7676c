"""Which parallel layouts fit a model and a launch: everything the engine would refuse late, or compute wrongly.

Refused before anything is built, with the numbers that would fit. Layers go to pipeline stages evenly
(``split_layers``), but for a first or last stage that is given its own number; under a virtual pipeline every stage
holds several chunks of consecutive layers, and the chunks of all stages take turns.
Source: megatron-core 0.16 ``transformer_config.py``, ``transformer_block.py``, ``pipeline_parallel/schedules.py``.
"""

from megatron_adapt.config import TrainSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.shape import LlamaShape

_FIRST, _LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"


def check_parallelism(shape: LlamaShape, train: TrainSettings, *, padded_vocab_size: int, num_ranks: int) -> None:
    """Refuse a layout that does not fit the model, or ranks and batch that do not fit the layout.

    Raises:
        ConfigError: with the numbers that would fit.
    """
    check_layout(shape, train, padded_vocab_size=padded_vocab_size)
    check_launch(train, num_ranks=num_ranks)


def check_layout(shape: LlamaShape, train: TrainSettings, *, padded_vocab_size: int) -> None:
    """Refuse a parallel layout that does not fit the model, naming the sizes that do.

    Raises:
        ConfigError: a size does not divide what it has to divide, or settings exclude each other.
    """
    tp = train.tensor_model_parallel_size
    split = (shape.num_query_groups, shape.ffn_hidden_size, padded_vocab_size)
    fits = [n for n in (1, 2, 4, 8) if not any(size % n for size in split)]
    if tp not in fits:
        raise ConfigError(
            f"train.tensor_model_parallel_size: {tp} does not fit the model's {split[0]} key-value heads, {split[1]} "
            f"feed-forward columns and {split[2]} vocabulary rows; use {_either(fits)}"
        )
    split_layers(shape.num_layers, train)
    _check_recompute(shape, train)
    if train.sequence_parallel and tp == 1:
        raise ConfigError("train.sequence_parallel: has no effect at tensor_model_parallel_size 1; switch it off")
    _check_sequence(shape, train)
    _check_fp8(shape, train)


def split_layers(num_layers: int, train: TrainSettings) -> list[int]:
    """Return how many layers every pipeline stage holds, over all chunks of a virtual pipeline.

    Raises:
        ConfigError: the layers cannot be split so.
    """
    pp, vpp = train.pipeline_model_parallel_size, train.virtual_pipeline_model_parallel_size
    first, last = train.num_layers_in_first_pipeline_stage, train.num_layers_in_last_pipeline_stage
    if pp == 1:
        named = {"virtual_pipeline_model_parallel_size": vpp > 1, _FIRST: first, _LAST: last}
        for name in (name for name, is_set in named.items() if is_set):
            raise ConfigError(f"train.{name}: has no effect at pipeline_model_parallel_size 1; leave it out")
    shared, others = num_layers - first - last, pp - bool(first) - bool(last)
    fits = [n for n in range(1, num_layers + 1) if not num_layers % n]
    if not (first or last) and num_layers % pp:
        raise ConfigError(
            f"train.pipeline_model_parallel_size: {pp} does not divide {num_layers} layers; use {_either(fits)}, or "
            f"give {_FIRST} or {_LAST}"
        )
    if shared < others or shared % others if others else shared:
        raise ConfigError(
            f"train.{_FIRST if first else _LAST}: {first} layers in the first stage and {last} in the last leave "
            f"{shared} for {others} stages (0: like the others); leave a multiple of {others}"
        )
    between = shared // others if others else 0
    stages = [first or between, *[between] * (pp - 2), last or between] if pp > 1 else [num_layers]
    if any(size % vpp for size in stages):
        fits = [n for n in range(1, max(stages) + 1) if not any(size % n for size in stages)]
        raise ConfigError(
            f"train.virtual_pipeline_model_parallel_size: {vpp} does not divide the layers of the stages, "
            f"{' + '.join(map(str, stages))}; use {_either(fits)}"
        )
    return stages


def _check_recompute(shape: LlamaShape, train: TrainSettings) -> None:
    """Refuse more recomputed layers than a chunk of the model has."""
    chunk = max(split_layers(shape.num_layers, train)) // train.virtual_pipeline_model_parallel_size
    if train.recompute_granularity == "full" and train.recompute_num_layers > chunk:
        raise ConfigError(
            f"train.recompute_num_layers: {train.recompute_num_layers} exceeds the {chunk} layers of a part of the "
            f"model; use at most {chunk}"
        )


def _check_sequence(shape: LlamaShape, train: TrainSettings) -> None:
    """Refuse windows that the ranks of a sequence cannot share, or that are longer than the model's."""
    length, cp = train.seq_length, train.context_parallel_size
    # Every rank holds two pieces, from the front and from the back, so that all have as much to attend to.
    pieces = (2 * cp if cp > 1 else 1) * (train.tensor_model_parallel_size if train.sequence_parallel else 1)
    if length % pieces:
        needs = "context_parallel_size" if cp > 1 else "sequence_parallel"
        sizes = f"tensor_model_parallel_size {train.tensor_model_parallel_size}" if cp == 1 else f"{pieces}"
        raise ConfigError(
            f"train.seq_length: {length} is not a multiple of {sizes}, which {needs} needs; use "
            f"{length - length % pieces or pieces}"
        )
    if length > shape.max_position_embeddings:
        raise ConfigError(
            f"train.seq_length: {length} exceeds the model's {shape.max_position_embeddings} positions; "
            f"use at most {shape.max_position_embeddings}"
        )
    if train.transformer_impl == "transformer_engine" and train.reset_attention_mask:
        raise ConfigError(
            'train.reset_attention_mask: does not run with transformer_impl "transformer_engine", whose attention '
            'knows no documents; use "local"'
        )
    if cp > 1 and train.reset_attention_mask:
        raise ConfigError(
            f"train.reset_attention_mask: does not run at context_parallel_size {cp}, where a document may lie on "
            "several ranks; use 1 and split the matrices (tensor_model_parallel_size) instead"
        )


def _check_fp8(shape: LlamaShape, train: TrainSettings) -> None:
    """Refuse products whose axes are not made of whole blocks of FP8.

    Source: megatron-core 0.16 ``fp8_utils.get_fp8_align_size``.
    """
    if train.fp8 == "none":
        return
    tp, block = train.tensor_model_parallel_size, 32 if train.fp8_recipe == "mxfp8" else 16
    sizes = {
        "hidden_size": shape.hidden_size,
        "query columns of a rank": shape.num_attention_heads * shape.kv_channels // tp,
        "key and value columns of a rank": shape.num_query_groups * shape.kv_channels // tp,
        "feed-forward columns of a rank": shape.ffn_hidden_size // tp,
        "tokens of a micro-batch on a rank": train.micro_batch_size * train.seq_length // train.context_parallel_size,
    }
    for name, size in sizes.items():
        if size % block:
            raise ConfigError(
                f'train.fp8: "{train.fp8}" with recipe "{train.fp8_recipe}" multiplies blocks of {block}, and {size} '
                f'{name} are no multiple of it; use "none"'
            )


def check_launch(train: TrainSettings, *, num_ranks: int) -> None:
    """Refuse a number of ranks that does not fit the layout, or a batch that does not fit the ranks.

    Raises:
        ConfigError: with the numbers that would fit.
    """
    sizes = {
        "tensor_model_parallel_size": train.tensor_model_parallel_size,
        "pipeline_model_parallel_size": train.pipeline_model_parallel_size,
        "context_parallel_size": train.context_parallel_size,
    }
    model_ranks = train.model_parallel_size
    if num_ranks % model_ranks:
        named = " x ".join(f"{name} {size}" for name, size in sizes.items() if name[0] != "c" or size > 1)
        raise ConfigError(f"launch: {num_ranks} ranks cannot hold {named}; start a multiple of {model_ranks} ranks")
    unit = count_batch_unit(train, num_ranks=num_ranks)
    if train.global_batch_size % unit:
        copies, micro = num_ranks // model_ranks, train.micro_batch_size
        stages = f" x {_group(train)} pipeline stages, which a virtual pipeline needs" if _group(train) > 1 else ""
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of micro_batch_size {micro} x "
            f"{copies} data-parallel ranks{stages}; use a multiple of {unit}"
        )


def count_batch_unit(train: TrainSettings, *, num_ranks: int) -> int:
    """Count the windows that a batch must be a multiple of: those that all ranks take at once."""
    return num_ranks // train.model_parallel_size * train.micro_batch_size * _group(train)


def _group(train: TrainSettings) -> int:
    """Return how many micro-batches go through a pipeline together; the interleaved schedule sends one per stage."""
    return train.pipeline_model_parallel_size if train.virtual_pipeline_model_parallel_size > 1 else 1


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))

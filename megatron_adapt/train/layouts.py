"""Find a parallel layout whose ranks fit into a device.

``find_layout`` tries tensor x pipeline sizes that divide heads, groups, layers, ranks and batch, the least model
parallelism first - it costs communication, a pipeline bubble, or both - and among equals the shorter pipeline. Sequence
parallelism is on wherever it can be: it saves activations and carries the same bytes (Korthikanti et al. 2022, arXiv
2205.05198). What cannot fit by its weights, gradients and moments alone is passed over, everything else is measured
(``memory``).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from megatron_adapt.errors import ConfigError
from megatron_adapt.parallelism import check_parallelism
from megatron_adapt.train.flops import count_learning
from megatron_adapt.train.memory import Job, RankMemory, measure_stages

_TENSOR_SIZES = (1, 2, 4, 8)
_GRADIENT_AND_MOMENTS = (4, 8)
"Bytes of a value that learns."


def check_job(job: Job) -> None:
    """Refuse a layout that does not fit the model, or ranks and batch that do not fit the layout.

    Raises:
        ConfigError: with the numbers that would fit.
    """
    check_parallelism(job.shape, job.train, padded_vocab_size=job.padded_vocab_size, num_ranks=job.world_size)


def find_layout(job: Job, memory: float) -> tuple[Job, list[RankMemory]] | None:
    """Return the job in the cheapest layout whose every rank takes at most ``memory`` bytes; None if there is none."""
    for candidate in list_layouts(job):
        if count_least(candidate) > memory:
            continue
        stages = measure_stages(candidate)
        if max(stage.total for stage in stages) <= memory:
            return candidate, stages
    return None


def list_layouts(job: Job) -> Iterator[Job]:
    """Yield the job in every layout that is possible, the cheapest first."""
    sizes = product(_TENSOR_SIZES, range(1, job.shape.num_layers + 1))
    for tensor, pipeline in sorted(sizes, key=lambda pair: (pair[0] * pair[1], pair[1])):
        train = replace(
            job.train,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            sequence_parallel=tensor > 1 and job.train.seq_length % tensor == 0,
            # A proposal is plain: the layers evenly, in one part, the windows whole.
            virtual_pipeline_model_parallel_size=1,
            num_layers_in_first_pipeline_stage=0,
            num_layers_in_last_pipeline_stage=0,
            context_parallel_size=1,
        )
        candidate = replace(job, train=train)
        try:
            check_job(candidate)
        except ConfigError:
            continue
        yield candidate


def count_least(job: Job) -> float:
    """Return a number of bytes that some rank takes whatever its activations are."""
    whole = replace(job.shape, vocab_size=job.padded_vocab_size)
    learning = count_learning(job.shape, job.padded_vocab_size, job.stage.trainable, job.new_blocks)
    gradient, moments = _GRADIENT_AND_MOMENTS
    state = moments + (4 if job.train.bf16 else 0)
    # Also ranks that share a window split the optimizer.
    cut = job.num_copies * job.train.context_parallel_size if job.train.use_distributed_optimizer else 1
    split = job.train.tensor_model_parallel_size * job.train.pipeline_model_parallel_size
    weights = whole.num_parameters * (2 if job.train.bf16 else 4)
    return (weights + learning * (gradient + state / cut)) / split

"""The report of ``tools/plan_run.py``: one training stage in a dozen lines."""

from megatron_adapt.config import PlanRun
from megatron_adapt.train.costs import StageCosts

_COLUMNS = ("weights", "gradients", "optimizer", "activations", "working", "total")


def show_costs(costs: StageCosts, other: StageCosts | None, config: PlanRun, *, distils: bool) -> str:
    """Return the report of one training stage.

    Args:
        costs: what it takes in the layout of the recipe.
        other: what it takes in a layout that fits, where that one does not.
        config: what was asked.
        distils: whether it distils tokens, which takes passes that are not counted.
    """
    lines = [f"stage {costs.stage}: learns {costs.trainable}, {costs.world_size:,} ranks = {_name_layout(costs)}"]
    lines += [
        f"  model: {costs.parameters / 1e9:,.3f} G parameters, {costs.learning / 1e9:,.3f} G of them learn; vocabulary "
        f"{costs.vocab_size:,}, padded to {costs.padded_vocab_size:,}",
        "  memory of a rank at the worst moment of a step, in GB:",
    ]
    lines += [f"    {line}" for line in _make_table(costs)]
    lines += [f"  {line}" for line in (_judge(costs, other, config), *_list_totals(costs, config))]
    if distils:
        lines.append("  token distillation runs the model more than once a step; planned as language modelling")
    return "\n".join(lines) + "\n"


def _name_layout(costs: StageCosts) -> str:
    sequence = " + SP" if costs.sequence_parallel else ""
    tensor, pipeline = costs.tensor_model_parallel_size, costs.pipeline_model_parallel_size
    parts, shared = costs.virtual_pipeline_model_parallel_size, costs.context_parallel_size
    virtual, context = f" (VPP {parts})" if parts > 1 else "", f" x CP {shared}" if shared > 1 else ""
    return f"TP {tensor}{sequence} x PP {pipeline}{virtual}{context} x DP {costs.num_copies}"


def _make_table(costs: StageCosts) -> list[str]:
    """Make a line per pipeline stage."""
    rows = [["stage", "in flight", *_COLUMNS]]
    for number, rank in enumerate(costs.ranks):
        numbers = (f"{getattr(rank, column) / 1e9:.3f}" for column in _COLUMNS)
        rows.append([f"{number}", f"{rank.in_flight}", *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _judge(costs: StageCosts, other: StageCosts | None, config: PlanRun) -> str:
    needed = f"{costs.worst.total / 1e9:.1f} of {costs.device_bytes / 1e9:g} GB of {config.device}"
    if costs.fits:
        return f"fits: {needed}"
    stage = costs.ranks.index(costs.worst)
    does_not = f"does not fit: a rank of pipeline stage {stage} takes {needed}"
    if other is None:
        return (
            f"{does_not}, and no layout of {costs.world_size} ranks does; lower micro_batch_size or seq_length, or "
            "take more ranks"
        )
    flags = [
        f"--train.tensor-model-parallel-size {other.tensor_model_parallel_size}",
        f"--train.pipeline-model-parallel-size {other.pipeline_model_parallel_size}",
        f"--train.{'' if other.sequence_parallel else 'no-'}sequence-parallel",
    ]
    return f"{does_not}; {_name_layout(other)} takes {other.worst.total / 1e9:.1f}: {' '.join(flags)}"


def _list_totals(costs: StageCosts, config: PlanRun) -> list[str]:
    days = "" if costs.days is None else f", {costs.days:,.3g} days at {config.mfu:g} of the peak of {config.device}"
    sent = {
        "tensor": costs.sent_by_tensor,
        "context": costs.sent_by_context,
        "pipeline": costs.sent_by_pipeline,
        "data": costs.sent_by_data,
        "tied embedding": costs.sent_by_tied,
    }
    parts = [f"{name} {size / 1e9:,.3f}" for name, size in sent.items() if size]
    return [
        f"steps: {costs.steps:,} of {costs.tokens_per_step:,} tokens, {costs.micro_batches:,} micro-batches a rank; "
        f"pipeline bubble {costs.bubble:.1%}",
        f"arithmetic: {costs.flops_per_step:.4g} FLOPs a step, {costs.flops_per_step * costs.steps:.3g} in all{days}",
        f"checkpoint: {costs.checkpoint_bytes / 1e9:,.2f} GB, {costs.save_seconds:,.0f} s at {config.save_speed:g} "
        f"GB/s, {costs.num_saves:,} in all",
        f"sent by a rank in a step, in GB: {', '.join(parts) or 'nothing'}",
    ]

"""Look into tokenised data: decode it, count it, check it, join it, trace a training step to it.

``python tools/inspect_data.py show --prefix tokens/ja/train --tokenizer tokenizer --document 3``
``python tools/inspect_data.py doctor --prefix tokens/ja/train tokens/en/train``
"""

from typing import Any

from megatron_adapt.config import CheckTokens, DescribeTokens, MergeTokens, ShowTokens, TraceStep
from megatron_adapt.flags import load_command, run_tool

if __name__ == "__main__":
    kinds: dict[str, type[Any]] = {"show": ShowTokens, "stats": DescribeTokens, "doctor": CheckTokens}
    kinds |= {"merge": MergeTokens, "trace": TraceStep}
    name, config = load_command(kinds)
    from megatron_adapt.data.doctor import check_tokens
    from megatron_adapt.data.inspect import describe_tokens, show_tokens
    from megatron_adapt.data.merge import merge_tokens
    from megatron_adapt.data.trace import trace_step

    entries: dict[str, Any] = {
        "show": show_tokens,
        "stats": describe_tokens,
        "doctor": check_tokens,
        "merge": merge_tokens,
        "trace": trace_step,
    }
    run_tool(entries[name], config)

"""The token files of a blend, opened and checked against each other and against the plan.

Guarantees: all come from one tokenizer; each holds as many windows as the plan counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.data.align import cut_documents
from megatron_adapt.data.index import TokensFile, bin_path, read_tokens
from megatron_adapt.data.plan import BlendPlan
from megatron_adapt.data.prompts import read_prompts
from megatron_adapt.data.record import TokensRecord, data_fingerprint, read_record
from megatron_adapt.data.windows import count_windows
from megatron_adapt.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Sources by name, in the order of the plan."""

    files: dict[str, TokensFile]
    "Their mapped ids."
    cuts: dict[str, NDArray[np.int64]]
    "First token of each window (and the last token) of sources that are cut where documents begin."
    records: dict[str, TokensRecord]
    "Their counts."
    fingerprints: dict[str, str]
    "Hash of each source's data, which decides its order."
    prompts: dict[str, tuple[NDArray[np.int64], NDArray[np.int32]]]
    "First token of each document (and the number of tokens), and its prompt tokens; of sources that have prompts."
    tokenizer_fingerprint: str
    "Fingerprint of the tokenizer of all."


def open_sources(plan: BlendPlan, prefixes: Mapping[str, Path]) -> Sources:
    """Open the sources of a plan.

    Args:
        plan: windows per source.
        prefixes: prefix of the token files of each source.

    Raises:
        ConfigError: a source of the plan has no prefix.
        DataError: files are missing or damaged, do not fit the plan, or come from different tokenizers.
    """
    files: dict[str, TokensFile] = {}
    cuts: dict[str, NDArray[np.int64]] = {}
    for source, available in zip(plan.sources, plan.available, strict=True):
        if source not in prefixes:
            raise ConfigError(f"blend.{source}: no token files were named; tokenise the source first")
        prefix = prefixes[source]
        files[source] = read_tokens(prefix)
        windows = count_windows(files[source].num_tokens, plan.seq_length)
        if plan.aligned:
            cuts[source] = cut_documents(files[source].starts(), plan.seq_length)
            windows = len(cuts[source]) - 1
        if windows != available:
            raise DataError(
                f"{bin_path(prefix)}: {windows} windows of {plan.seq_length} tokens where the plan counted "
                f"{available}; the data changed, make the plan again"
            )
    records = {source: read_record(prefixes[source]) for source in plan.sources}
    return Sources(
        files=files,
        cuts=cuts,
        records=records,
        fingerprints={source: data_fingerprint(prefixes[source]) for source in plan.sources},
        prompts={
            source: (file.starts(), prompts_D)
            for source, file in files.items()
            if (prompts_D := read_prompts(file.prefix, file.num_documents)) is not None
        },
        tokenizer_fingerprint=check_tokenizers({prefixes[source]: record for source, record in records.items()}),
    )


def check_tokenizers(records: Mapping[Path, TokensRecord]) -> str:
    """Return the fingerprint of the tokenizer that made all of these token files.

    Raises:
        DataError: two of them come from different tokenizers.
    """
    (one, first), *others = records.items()
    for other, record in others:
        if record.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise DataError(
                f"{bin_path(other)}: made by tokenizer {record.tokenizer_fingerprint}, but {bin_path(one)} by "
                f"{first.tokenizer_fingerprint}; tokenise both with the same one"
            )
    return first.tokenizer_fingerprint

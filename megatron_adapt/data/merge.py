"""Join tokenised data: the documents of several prefixes behind one another under a new one.

Guarantees: the result is what ``tools/preprocess_data.py`` would write for all inputs in this order; data of different
tokenizers, with and without end-of-document tokens, or with documents whole and cut into sentences do not mix.
"""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from megatron_adapt.config import MergeTokens
from megatron_adapt.data.index import TokensFile, TokensWriter, idx_path, read_tokens, write_tokens
from megatron_adapt.data.prompts import join_prompts
from megatron_adapt.data.record import read_appended_eod, read_cut, read_record, record_path
from megatron_adapt.data.sources import check_tokenizers
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import write_stage
from megatron_adapt.logs import show_progress

_BLOCK_DOCUMENTS = 1 << 16


def merge_tokens(config: MergeTokens) -> None:
    """Write all documents of ``config.prefix`` to ``config.output_prefix``.

    Raises:
        ConfigError: the output exists and ``overwrite`` is off, or is one of the inputs.
        DataError: an input is missing or damaged, or does not fit the others.
    """
    output = config.output_prefix
    if output.absolute() in {prefix.absolute() for prefix in config.prefix}:
        raise ConfigError(f"--output-prefix: {output} is one of the inputs; name another output")
    if idx_path(output).exists() and not config.overwrite:
        raise ConfigError(f"{idx_path(output)}: exists already; name another output or add --overwrite")
    records = {prefix: read_record(prefix) for prefix in config.prefix}
    check_tokenizers(records)
    endings = {prefix: read_appended_eod(prefix) for prefix in config.prefix}
    first, *others = endings
    for prefix in others:
        if endings[prefix] != endings[first]:
            raise DataError(
                f"{prefix}: its documents end with token {endings[prefix]}, those of {first} with {endings[first]}; "
                "tokenise both with or without --append-eod"
            )
    cuts = {prefix: read_cut(prefix) for prefix in config.prefix}
    for prefix in others:
        if cuts[prefix] != cuts[first]:
            raise DataError(
                f"{prefix}: made with {_name_cut(cuts[prefix])}, {first} with {_name_cut(cuts[first])}; tokenise both "
                "with the same settings"
            )
    total = sum(record.tokens for record in records.values()) / 1e6
    vocab_size = records[first].vocab_size
    files = [read_tokens(prefix) for prefix in config.prefix]
    with show_progress("merging", total, "M tokens") as advance, write_tokens(output, vocab_size) as writer:
        for file in files:
            for num_tokens in _append(file, writer):
                advance(num_tokens / 1e6)
        join_prompts(files, output)
    sums = {
        name: sum(getattr(record, name) for record in records.values())
        for name in ("documents", "skipped_documents", "tokens", "bytes")
    }
    settings = {"append_eod": endings[first] is not None}
    asked = {"prefix": list(map(str, config.prefix)), **cuts[first], "settings": settings}
    inputs = [record_path(prefix) for prefix in config.prefix]
    write_stage(record_path(output), config=asked, inputs=inputs, counts={**asdict(records[first]), **sums})


def _name_cut(cut: dict[str, bool]) -> str:
    return ", ".join(f"{name} = {str(is_set).lower()}" for name, is_set in cut.items())


def _append(file: TokensFile, writer: TokensWriter) -> Iterator[int]:
    """Append a file's documents; yield the tokens written after every block."""
    starts_S1 = file.sequence_starts()
    for at in range(0, file.num_documents, _BLOCK_DOCUMENTS):
        firsts = file.documents_D1[at : at + _BLOCK_DOCUMENTS + 1]
        bounds = starts_S1[firsts[0] : firsts[-1] + 1]
        lengths = np.diff(bounds).astype(np.int32)
        writer.add_documents(file.tokens_N[bounds[0] : bounds[-1]], lengths, firsts[:-1] - firsts[0])
        yield int(bounds[-1] - bounds[0])

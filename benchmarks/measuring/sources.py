"""Token files of invented sources."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_adapt.data.index import bin_path, idx_path, token_dtype, write_index
from megatron_adapt.data.record import TokensRecord, record_path
from megatron_adapt.files import write_json

VOCAB_SIZE = 64_000
MEAN_TOKENS = 700


def write_sources(folder: Path, num_sources: int, num_documents: int) -> dict[str, Path]:
    """Write sources of equally many documents, of log-normal length with a mean of 700 tokens.

    Every id is 0: the ``.bin`` files are one hole and take no space where the file system knows holes.

    Returns:
        The prefix of each source's files.
    """
    # The mean of a log-normal number is exp(mu + sigma^2 / 2).
    drawn = np.random.default_rng(num_sources).lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, num_documents)
    lengths = np.maximum(1, drawn).astype(np.int32)
    prefixes = {}
    for at, lengths_D in enumerate(np.array_split(lengths, num_sources)):
        prefix = folder / f"source{at}"
        write_index(idx_path(prefix), lengths_D, token_dtype(VOCAB_SIZE))
        num_tokens = int(lengths_D.sum(dtype=np.int64))
        with bin_path(prefix).open("wb") as file:
            file.truncate(num_tokens * token_dtype(VOCAB_SIZE).itemsize)
        record = TokensRecord(
            documents=len(lengths_D), skipped_documents=0, tokens=num_tokens, bytes=4 * num_tokens,
            tokenizer_fingerprint="none", vocab_size=VOCAB_SIZE, eod_id=None,
        )  # fmt: skip
        write_json(record_path(prefix), {"counts": asdict(record)})
        prefixes[prefix.name] = prefix
    return prefixes

"""Look into tokenised data: decode a document or a window, count what is there.

Reads: PREFIX.bin, PREFIX.idx, PREFIX.stage.json, a tokenizer. Writes: the terminal, and JSON when asked.
Costs: decoding reads one document or window; describing reads every id once, about 1 GB a second.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from megatron_adapt.config import DescribeTokens, ShowTokens
from megatron_adapt.data.index import TokensFile, bin_path, read_tokens
from megatron_adapt.data.record import TokensRecord, read_record
from megatron_adapt.data.windows import count_windows
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import write_json
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer

_BLOCK_TOKENS = 1 << 24
_QUANTILES = (0.05, 0.5, 0.95)
_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class TokensFigures:
    """What is in one PREFIX.bin."""

    documents: int
    tokens: int
    bytes: int
    "Bytes of text."
    bytes_per_token: float
    length_quantiles: dict[str, int]
    "Tokens of a document: 5th, 50th and 95th percentile."
    longest: int
    eod_share: float
    "Share of the tokens that are the end-of-document token."
    vocabulary_used: float
    "Share of the ids that occur."


def show_tokens(config: ShowTokens) -> str:
    """Print a document or a window as text, or token by token.

    Returns:
        What was printed.

    Raises:
        ConfigError: there is no document or window of that number.
        DataError: the data are missing or damaged, or were made by another tokenizer.
    """
    file, record, tokenizer = read_tokens(config.prefix), read_record(config.prefix), read_tokenizer(config.tokenizer)
    check_tokenizer(config.prefix, record, tokenizer)
    if config.document is not None:
        starts = file.starts()
        _check_number("--document", config.document, file.num_documents, config.prefix)
        first, end = int(starts[config.document]), int(starts[config.document + 1])
    else:
        assert config.window is not None
        _check_number("--window", config.window, count_windows(file.num_tokens, config.seq_length), config.prefix)
        first = config.window * config.seq_length
        end = first + config.seq_length + 1
    ids = [int(index) for index in file.tokens_N[first:end]]
    if config.pieces:
        pieces = (f"{first + at}\t{index}\t{tokenizer.tokenizer.id_to_token(index)}" for at, index in enumerate(ids))
        shown = "\n".join(pieces)
    else:
        shown = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    Console(highlight=False, markup=False, soft_wrap=True).print(shown)
    return shown


def check_tokenizer(prefix: Path, record: TokensRecord, tokenizer: LoadedTokenizer) -> None:
    """Refuse a tokenizer that did not make the data.

    Raises:
        DataError: naming both fingerprints.
    """
    if record.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{bin_path(prefix)}: made by tokenizer {record.tokenizer_fingerprint}, {tokenizer.folder} is "
            f"{tokenizer.fingerprint}; name the tokenizer it was made with"
        )


def _check_number(flag: str, number: int, count: int, prefix: Path) -> None:
    if not 0 <= number < count:
        raise ConfigError(f"{flag}: {number} is not below {count}, the number {bin_path(prefix)} has")


def describe_tokens(config: DescribeTokens) -> dict[str, TokensFigures]:
    """Count what every prefix holds, show a table and write ``config.json``.

    Raises:
        DataError: the data are missing or damaged.
    """
    figures = {str(prefix): measure_tokens(prefix) for prefix in config.prefix}
    _show(figures)
    if config.json:
        write_json(config.json, {name: asdict(item) for name, item in figures.items()})
    return figures


def measure_tokens(prefix: Path) -> TokensFigures:
    """Count what one prefix holds."""
    file, record = read_tokens(prefix), read_record(prefix)
    lengths_D = file.lengths()
    used_V, eod = np.zeros(record.vocab_size, bool), 0
    for block_N in iterate_blocks(file):
        used_V[block_N[block_N < record.vocab_size]] = True
        eod += 0 if record.eod_id is None else int((block_N == record.eod_id).sum())
    quantiles = np.quantile(lengths_D, _QUANTILES, method="lower")
    return TokensFigures(
        documents=file.num_documents,
        tokens=file.num_tokens,
        bytes=record.bytes,
        bytes_per_token=record.bytes_per_token,
        length_quantiles={f"{share:.0%}": int(value) for share, value in zip(_QUANTILES, quantiles, strict=True)},
        longest=int(lengths_D.max()),
        eod_share=eod / file.num_tokens,
        vocabulary_used=float(used_V.mean()),
    )


def iterate_blocks(file: TokensFile) -> Iterator[NDArray[Any]]:
    """Yield all ids, 16 million at a time."""
    for start in range(0, file.num_tokens, _BLOCK_TOKENS):
        yield file.tokens_N[start : start + _BLOCK_TOKENS]


def _show(figures: Mapping[str, TokensFigures]) -> None:
    table = Table(title="tokenised data")
    headings = ("documents", "tokens", "bytes/token", "length 5/50/95 %", "longest", "EOD", "vocabulary used")
    for at, heading in enumerate(("prefix", *headings)):
        table.add_column(heading, justify="right" if at else "left", overflow="fold")
    for name, item in figures.items():
        table.add_row(
            name,
            f"{item.documents:,}",
            f"{item.tokens:,}",
            f"{item.bytes_per_token:.2f}",
            " / ".join(f"{length:,}" for length in item.length_quantiles.values()),
            f"{item.longest:,}",
            f"{item.eod_share:.2%}",
            f"{item.vocabulary_used:.1%}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)

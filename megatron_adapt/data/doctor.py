"""Look for what is wrong with tokenised data.

Reads: PREFIX.bin, PREFIX.idx, PREFIX.stage.json, a tokenizer when one is named. ``CHECKS`` is the table of checks; each
yields findings, worst first. Files that cannot be read at all (truncated, of two runs, of another format) are a finding
of their own, in the words of ``read_tokens``.
Costs: every id is read once; a 16-byte hash for every document.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_adapt.config import CheckTokens
from megatron_adapt.data.index import TokensFile, read_tokens, token_dtype
from megatron_adapt.data.inspect import check_tokenizer, iterate_blocks
from megatron_adapt.data.record import TokensRecord, read_appended_eod, read_record
from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patient:
    """One prefix, opened."""

    prefix: Path
    file: TokensFile
    record: TokensRecord
    tokenizer: LoadedTokenizer | None


def check_tokens(config: CheckTokens) -> None:
    """Print every finding.

    Raises:
        DataError: there is at least one.
    """
    tokenizer = read_tokenizer(config.tokenizer) if config.tokenizer else None
    total = 0
    for prefix in config.prefix:
        findings = list(examine(prefix, tokenizer))
        for finding in findings:
            _logger.error("%s: %s", prefix, finding)
        if not findings:
            _logger.info("%s: nothing wrong", prefix)
        total += len(findings)
    if total:
        raise DataError(f"--prefix: {total} findings in {len(config.prefix)} datasets; each is named above")


def examine(prefix: Path, tokenizer: LoadedTokenizer | None = None) -> Iterator[str]:
    """Yield what is wrong with one prefix."""
    try:
        patient = Patient(prefix=prefix, file=read_tokens(prefix), record=read_record(prefix), tokenizer=tokenizer)
    except DataError as error:
        yield str(error)
        return
    for check in CHECKS.values():
        yield from check(patient)


def check_counts(patient: Patient) -> Iterator[str]:
    """Compare the files with the counts their record has."""
    for name in ("documents", "tokens"):
        found, recorded = getattr(patient.file, f"num_{name}"), getattr(patient.record, name)
        if found != recorded:
            yield f"{found} {name} in the files, {recorded} in the record; the files are of two runs, tokenise again"


def check_vocabulary(patient: Patient) -> Iterator[str]:
    """Look for ids that the tokenizer does not have."""
    size = patient.record.vocab_size
    beyond = sum(int(((block_N >= size) | (block_N < 0)).sum()) for block_N in iterate_blocks(patient.file))
    if beyond:
        yield f"{beyond} ids are not below the vocabulary of {size}; the .bin is damaged, tokenise again"


def check_type(patient: Patient) -> Iterator[str]:
    """Compare the type of the ids with the one their vocabulary asks for."""
    found, expected = patient.file.tokens_N.dtype, token_dtype(patient.record.vocab_size)
    if found != expected:
        yield f"ids are {found}, a vocabulary of {patient.record.vocab_size} is written as {expected}; tokenise again"


def check_fingerprint(patient: Patient) -> Iterator[str]:
    """Compare the tokenizer with the one that made the data."""
    if patient.tokenizer:
        try:
            check_tokenizer(patient.prefix, patient.record, patient.tokenizer)
        except DataError as error:
            yield str(error)


def check_ends(patient: Patient) -> Iterator[str]:
    """Look for documents that do not end as the record says, or that have an end inside."""
    eod_id = read_appended_eod(patient.prefix)
    if eod_id is None:
        return
    starts_D1 = patient.file.starts()
    filled_D = np.diff(starts_D1) > 0
    last_D = patient.file.tokens_N[starts_D1[1:][filled_D] - 1]
    wrong = int((last_D != eod_id).sum())
    if wrong:
        yield f"{wrong} documents do not end with the end-of-document token {eod_id}; tokenise again"
    inside = sum(int((block_N == eod_id).sum()) for block_N in iterate_blocks(patient.file))
    inside -= len(last_D) - wrong
    if inside:
        yield f"{inside} end-of-document tokens {eod_id} stand inside documents; the text spells the token, clean it"


def check_empty(patient: Patient) -> Iterator[str]:
    """Look for documents without a token of text."""
    shortest = 0 if read_appended_eod(patient.prefix) is None else 1
    empty = int((patient.file.lengths() <= shortest).sum())
    if empty:
        yield f"{empty} documents are empty; leave them out of the corpus"


def check_duplicates(patient: Patient) -> Iterator[str]:
    """Look for documents that occur more than once."""
    starts_D1 = patient.file.starts()
    tokens_N = patient.file.tokens_N
    hashes = {
        hashlib.blake2b(tokens_N[start:end].tobytes(), digest_size=16).digest() for start, end in pairwise(starts_D1)
    }
    repeated = patient.file.num_documents - len(hashes)
    if repeated:
        yield f"{repeated} documents repeat an earlier one; prepare the corpus with tools/prepare_corpus.py"


CHECKS: dict[str, Callable[[Patient], Iterator[str]]] = {
    "counts": check_counts,
    "vocabulary": check_vocabulary,
    "type": check_type,
    "fingerprint": check_fingerprint,
    "ends": check_ends,
    "empty": check_empty,
    "duplicates": check_duplicates,
}

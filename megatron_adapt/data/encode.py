"""Tokenise documents into PREFIX.bin, PREFIX.idx and PREFIX.stage.json.

Reads: files of one JSON document a line, and a tokenizer folder. Writes: the three files, or none.
Guarantees: documents keep their order; the output is the same for any number of workers, byte for byte; the first
mistake stops the work with one line that names file and line; documents of white space alone are left out and
counted. Ids are those of the tokenizer with its default special tokens (as in Megatron-LM's ``preprocess_data.py``),
then the end-of-document token if asked for.

Method:
1. ``_collect_batches`` groups documents into batches of about a megabyte.
2. ``_encode_batches`` tokenises them in this process or in several; at most two batches a worker are under way,
   so memory does not grow with the corpus. Every process tokenises on one thread: ``workers`` is the cores used.
3. ``write_tokens`` appends the arrays in order.
"""

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.config import PreprocessData
from megatron_adapt.corpus.documents import get_text, read_documents
from megatron_adapt.data.index import bin_path, idx_path, token_dtype, write_tokens
from megatron_adapt.data.record import TokensRecord, record_path
from megatron_adapt.errors import AdaptError, ConfigError, DataError
from megatron_adapt.files import require_file, write_stage
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, encode_texts, read_tokenizer

_BATCH_BYTES = 1 << 20
_THREADS_SWITCH = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class TextBatch:
    """Consecutive documents."""

    where: str
    "Place of the first one, file:line."
    texts: list[str]
    num_bytes: int
    "UTF-8 bytes of all texts."
    num_skipped: int
    "Empty documents met on the way."


@dataclass(frozen=True)
class TokenBatch:
    """The same documents as ids."""

    ids_N: NDArray[Any]
    lengths_D: NDArray[np.int32]
    num_bytes: int
    num_skipped: int


def preprocess_data(config: PreprocessData) -> TokensRecord:
    """Tokenise the documents of ``config.input``, in order.

    Raises:
        ConfigError: the output exists and ``overwrite`` is off.
        DataError: an input is missing, damaged or empty, or the tokenizer cannot do what was asked.
    """
    prefix = config.output_prefix
    outputs = (bin_path(prefix), idx_path(prefix), record_path(prefix))
    for path in outputs:
        if path.exists() and not config.overwrite:
            raise ConfigError(f"{path}: exists already; name another prefix or add --overwrite")
    for path in config.input:
        require_file(path, "--input")
    tokenizer = read_tokenizer(config.tokenizer)
    eod_id = _find_eod(tokenizer) if config.settings.append_eod else None
    num_bytes = num_skipped = 0
    with write_tokens(prefix, tokenizer.vocab_size) as writer:
        batches = _collect_batches(config.input, config.json_key)
        with show_progress(f"tokenising {prefix.name}", None, "MB") as advance:
            for batch in _encode_batches(batches, tokenizer, eod_id, config.settings.workers):
                writer.add_documents(batch.ids_N, batch.lengths_D)
                num_bytes += batch.num_bytes
                num_skipped += batch.num_skipped
                advance(batch.num_bytes / 1e6)
        if writer.num_tokens == 0:
            names = " ".join(str(path) for path in config.input)
            raise DataError(f"{names}: no documents ({num_skipped} empty ones); name files with text")
        record_path(prefix).unlink(missing_ok=True)
    record = TokensRecord(
        documents=writer.num_documents,
        skipped_documents=num_skipped,
        tokens=writer.num_tokens,
        bytes=num_bytes,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eos_id,
    )
    inputs = [*config.input, config.tokenizer]
    write_stage(record_path(prefix), config=config, inputs=inputs, counts=asdict(record))
    return record


def _find_eod(tokenizer: LoadedTokenizer) -> int:
    if tokenizer.eos_id is None:
        raise DataError(
            f"{tokenizer.folder}: the tokenizer has no end-of-document token (eos_token); name one in "
            "tokenizer_config.json or leave --append-eod out"
        )
    return tokenizer.eos_id


def _collect_batches(paths: Iterable[Path], text_key: str) -> Iterator[TextBatch]:
    first, texts, num_bytes, num_skipped = "", list[str](), 0, 0
    for where, document in read_documents(paths):
        text = get_text(document, text_key, where)
        first = first or where
        if not text.strip():
            num_skipped += 1
            continue
        texts.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= _BATCH_BYTES:
            yield TextBatch(first, texts, num_bytes, num_skipped)
            first, texts, num_bytes, num_skipped = "", [], 0, 0
    if first:
        yield TextBatch(first, texts, num_bytes, num_skipped)


def _encode_batches(
    batches: Iterator[TextBatch], tokenizer: LoadedTokenizer, eod_id: int | None, workers: int
) -> Iterator[TokenBatch]:
    """Yield every batch tokenised, in order."""
    if workers == 1:
        with _single_thread():
            for batch in batches:
                yield encode_batch(tokenizer, batch, eod_id)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A forked child would inherit the tokenizer's threads in an unknown state.
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.folder, eod_id),
    )
    under_way: deque[Future[TokenBatch]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_work, batch))
            if len(under_way) >= 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"--workers: one of {workers} processes was ended from outside, perhaps for lack of memory; use fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _single_thread() -> Iterator[None]:
    before = os.environ.get(_THREADS_SWITCH)
    os.environ[_THREADS_SWITCH] = "false"
    try:
        yield
    finally:
        os.environ.pop(_THREADS_SWITCH)
        if before is not None:
            os.environ[_THREADS_SWITCH] = before


_worker: dict[str, Any] = {}
"The tokenizer of a worker process; it is read once."


def _start_worker(folder: Path, eod_id: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    os.environ[_THREADS_SWITCH] = "false"
    _worker.update(tokenizer=read_tokenizer(folder), eod_id=eod_id)


def _work(batch: TextBatch) -> TokenBatch:
    return encode_batch(_worker["tokenizer"], batch, _worker["eod_id"])


def encode_batch(tokenizer: LoadedTokenizer, batch: TextBatch, eod_id: int | None) -> TokenBatch:
    """Tokenise one batch.

    Raises:
        DataError: the tokenizer fails on a text.
    """
    try:
        ids = encode_texts(tokenizer, batch.texts)
    except AdaptError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{batch.where}: the tokenizer failed on this or one of the next {len(batch.texts) - 1} documents "
            f"({error}); correct the text or the tokenizer"
        ) from None
    dtype = token_dtype(tokenizer.vocab_size)
    kept = [document for document in ids if document]  # a normalizer may leave nothing of a text
    ending = () if eod_id is None else (eod_id,)
    lengths_D = np.fromiter((len(document) + len(ending) for document in kept), np.int32, len(kept))
    flat = chain.from_iterable(chain(document, ending) for document in kept)
    ids_N = np.fromiter(flat, dtype, int(lengths_D.sum()))
    return TokenBatch(ids_N, lengths_D, batch.num_bytes, batch.num_skipped + len(ids) - len(kept))

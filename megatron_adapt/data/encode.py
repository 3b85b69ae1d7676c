"""Tokenise documents into PREFIX.bin, PREFIX.idx and PREFIX.stage.json.

Reads: documents (corpus/chunks.py says in which formats), and a tokenizer folder. Writes: the three files, or none;
PREFIX.skipped.txt where lines were left out; while it runs, and after it was stopped, the folder PREFIX.unfinished.
Guarantees: documents keep their order; the output is the same byte for byte for any number of workers, any backend, any
size of the chunks, and however often the run was killed and started again; the first mistake stops the work with one
line that names file and line; documents of white space alone are left out and counted. Ids are those of the tokenizer
with its default special tokens (as in Megatron-LM's ``preprocess_data.py``), then the end-of-document token if asked
for. With ``split_sentences`` documents are sequences of sentences, each encoded by itself; PREFIX.sentences.json holds
what was learned to cut them (split.py).

Method:
1. ``cut_files`` (corpus/chunks.py) cuts the input; workers (worker.py) encode chunks and write parts.
2. A row of the manifest (manifest.py) says that the parts of a chunk are written; ``Joiner`` (shards.py) appends them.
   Chunks that have a row when the run starts are only compared with their hash.
3. ``choose_backend`` (backend.py) decides on gigatoken, while the workers begin with it; a text of every chunk is
   compared with what tokenizers gives.
4. ``publish`` moves the joined files to their places, their documents shuffled where that was asked for.

Costs: the parent appends ready files, at the speed of the disk; a compressed file is decompressed by the parent alone,
at about 500 MB/s (zstd) or 250 MB/s (gzip). Memory does not grow with the input, but with its longest document: per
worker the tokenizer, its caches (backend.py) and three chunks of 4 MiB at most; a kilobyte a chunk in the parent.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_adapt.config import PreprocessData
from megatron_adapt.corpus.chunks import cut_files, sample_lines
from megatron_adapt.corpus.documents import get_text, parse_line
from megatron_adapt.corpus.inputs import find_files
from megatron_adapt.data.backend import BackendDiffersError, WantedBackend, choose_backend, expect_backend, find_affixes
from megatron_adapt.data.crew import Worker, start_workers
from megatron_adapt.data.index import bin_path, idx_path, token_dtype
from megatron_adapt.data.manifest import (
    Manifest,
    clear_folder,
    is_finished,
    lock_folder,
    open_manifest,
    read_header,
    remove_folder,
    unfinished_folder,
)
from megatron_adapt.data.record import TokensRecord, record_path
from megatron_adapt.data.run import InputChangedError, Run, write_error
from megatron_adapt.data.shards import Joiner, publish
from megatron_adapt.data.worker import Job
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import replace_file, write_json, write_stage
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer

if TYPE_CHECKING:  # nltk takes half a second to import
    from megatron_adapt.data.split import Splitter

_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 1 << 18, 4 << 20
_CHUNKS_PER_WORKER = 16
"Enough that no worker waits long for the last one."
_SAMPLE_TEXTS, _SAMPLE_CHARACTERS = 64, 2000

_logger = logging.getLogger(__name__)


class _NotTakenError(Exception):
    """``choose_backend`` decides against the backend that the workers have begun with."""


def preprocess_data(config: PreprocessData) -> dict[str, TokensRecord]:
    """Tokenise the documents of ``config.input``, in order.

    Returns:
        The record of every key's output.

    Raises:
        ConfigError: the output exists and ``overwrite`` is off, another job writes it, or an unfinished run with other
            settings lies there.
        DataError: an input is missing, damaged, empty or changed, the tokenizer cannot do what was asked, or the
            output cannot be written.
    """
    config = replace(config, input=find_files(config.input, "--input", config.plain_text))
    try:
        return _preprocess(config, config.settings.backend, begin_anew=False)
    except InputChangedError as error:
        if not config.overwrite:
            raise
        _logger.warning("%s; beginning anew", error)
        return _preprocess(config, config.settings.backend, begin_anew=True)
    except _NotTakenError:
        return _preprocess(config, "tokenizers", begin_anew=True)
    except BackendDiffersError as error:
        if config.settings.backend == "gigatoken":
            raise
        _logger.warning("%s; beginning anew with tokenizers, which is slower", error)
        return _preprocess(config, "tokenizers", begin_anew=True)


def _preprocess(config: PreprocessData, backend: WantedBackend, *, begin_anew: bool) -> dict[str, TokensRecord]:
    folder = unfinished_folder(config.output_prefix)
    with start_workers(config.settings.workers) as workers:
        tokenizer = read_tokenizer(config.tokenizer)
        eod_id = _find_eod(tokenizer) if config.settings.append_eod else None
        with _explain_write_errors(folder), lock_folder(folder):
            _refuse_existing(config, folder)
            if begin_anew:
                clear_folder(folder)
            backend, job = _make_job(config, backend, tokenizer, eod_id, folder)
            header = _make_header(config, job)
            with closing(open_manifest(folder, header, discard=config.overwrite)) as manifest:
                if job.splitter:
                    job.splitter.keep(folder)
                check = partial(_check_backend, config, backend, tokenizer, job)
                skipped_lines = _encode(config, workers, tokenizer, job, manifest, check)
                records = _count(config, tokenizer, manifest)
                publish(manifest, list(_name_outputs(config).values()), np.dtype(job.dtype))
            _write_records(config, records, skipped_lines, job)
            remove_folder(folder)
    return records


def _name_outputs(config: PreprocessData) -> dict[str, Path]:
    """Return the prefix of every key's output."""
    prefix = config.output_prefix
    if len(config.json_keys) == 1:
        return {config.json_keys[0]: prefix}
    return {key: prefix.with_name(f"{prefix.name}_{key}") for key in config.json_keys}


def _path_beside(config: PreprocessData, ending: str) -> Path:
    return config.output_prefix.with_name(f"{config.output_prefix.name}.{ending}")


def _refuse_existing(config: PreprocessData, folder: Path) -> None:
    if config.overwrite or is_finished(folder):  # what was killed while it moved its files goes on
        return
    for prefix in _name_outputs(config).values():
        for path in (bin_path(prefix), idx_path(prefix), record_path(prefix)):
            if path.exists():
                raise ConfigError(f"{path}: exists already; name another prefix or add --overwrite")


@contextmanager
def _explain_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(folder, error.strerror or str(error)) from None


def _find_eod(tokenizer: LoadedTokenizer) -> int:
    if tokenizer.eos_id is None:
        raise DataError(
            f"{tokenizer.folder}: the tokenizer has no end-of-document token (eos_token); name one in "
            "tokenizer_config.json or leave --append-eod out"
        )
    return tokenizer.eos_id


def _make_job(
    config: PreprocessData, backend: WantedBackend, tokenizer: LoadedTokenizer, eod_id: int | None, folder: Path
) -> tuple[WantedBackend, Job]:
    """Return the wanted backend, or that of the run that goes on, and the job."""
    tokenizer_json = tokenizer.tokenizer.to_str()
    stored = read_header(folder)
    if backend == "auto" and stored.get("tokenizer") == _hash_text(tokenizer_json):
        backend = stored["backend"]
    chosen = expect_backend(backend, tokenizer)
    if chosen == "tokenizers":
        choose_backend(backend, tokenizer, ())  # says why
    return backend, Job(
        folder=folder,
        backend=chosen,
        tokenizer_json=tokenizer_json,
        affixes=find_affixes(tokenizer.tokenizer) if chosen == "gigatoken" else ([], []),
        dtype=token_dtype(tokenizer.vocab_size).str,
        eod_id=eod_id,
        json_keys=config.json_keys,
        prompt_key=config.settings.prompt_key,
        skip_errors=config.settings.on_error == "skip",
        splitter=_choose_splitter(config, folder) if config.split_sentences else None,
    )


def _check_backend(config: PreprocessData, backend: WantedBackend, tokenizer: LoadedTokenizer, job: Job) -> None:
    if job.backend != "tokenizers" and choose_backend(backend, tokenizer, _sample_texts(config)) != job.backend:
        raise _NotTakenError


def _choose_splitter(config: PreprocessData, folder: Path) -> "Splitter":
    from megatron_adapt.data.split import choose_splitter

    return choose_splitter(config, folder)


def _sample_texts(config: PreprocessData) -> Iterator[str]:
    for line in sample_lines(config.input, _SAMPLE_TEXTS, config.plain_text):
        with suppress(DataError):  # named later, with its line
            document = parse_line(line, "")
            for key in config.json_keys:
                yield get_text(document, key, "")[:_SAMPLE_CHARACTERS]


def _make_header(config: PreprocessData, job: Job) -> dict[str, Any]:
    total = sum(path.stat().st_size for path in config.input)
    smallest, num_chunks = _MIN_CHUNK_BYTES, _CHUNKS_PER_WORKER * config.settings.workers
    if config.settings.partitions:
        smallest, num_chunks = 1, config.settings.partitions
    return {
        "format": 4,
        "tokenizer": _hash_text(job.tokenizer_json),
        "eod_id": job.eod_id,
        "json_keys": list(job.json_keys),
        "prompt_key": job.prompt_key,
        "shuffle_seed": config.settings.shuffle_seed,
        "plain_text": config.plain_text,
        "split_sentences": config.split_sentences,
        "keep_newlines": config.keep_newlines,
        "lang": job.splitter.hash_parameters() if job.splitter else None,
        "backend": job.backend,
        "chunk_bytes": min(max(total // num_chunks, smallest), _MAX_CHUNK_BYTES),
    }


def _hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _encode(
    config: PreprocessData,
    workers: Sequence[Worker],
    tokenizer: LoadedTokenizer,
    job: Job,
    manifest: Manifest,
    check: Callable[[], None],
) -> list[str]:
    """Encode what is not done yet and join all parts; return the lines that were left out, and why."""
    if not job.skip_errors:
        for row in [row for row in manifest.rows.values() if row.skipped_lines]:
            del manifest.rows[row.number]  # skipped by a run that was told to; this one stops there
    for worker in workers:
        worker.send(job)
    chunks = cut_files(config.input, manifest.header["chunk_bytes"], config.plain_text)
    total = sum(path.stat().st_size for path in config.input) / 1e6
    with ExitStack() as stack:
        joiner = None
        if not manifest.is_finished:
            joiner = stack.enter_context(Joiner(manifest, len(config.json_keys), np.dtype(job.dtype)))
        advance = stack.enter_context(show_progress(f"tokenising {config.output_prefix.name}", total, "MB"))
        run = Run(
            job=job,
            tokenizer=tokenizer.tokenizer,
            workers=workers,
            manifest=manifest,
            joiner=joiner,
            advance=advance,
            check=check,
        )
        run.encode_chunks(chunks)
        if joiner:
            joiner.sync()
    return list(run.list_skipped())


def _count(config: PreprocessData, tokenizer: LoadedTokenizer, manifest: Manifest) -> dict[str, TokensRecord]:
    """Return what the output of every key holds."""
    records = {}
    for at, key in enumerate(config.json_keys):
        parts = [row.parts[at] for row in manifest.rows.values()]
        record = records[key] = TokensRecord(
            documents=sum(part.documents for part in parts),
            skipped_documents=sum(part.skipped_documents for part in parts),
            tokens=sum(part.tokens for part in parts),
            bytes=sum(part.bytes for part in parts),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eos_id,
        )
        if record.tokens == 0:
            clear_folder(manifest.folder)
            names = " ".join(map(str, config.input))
            lines = sum(len(row.skipped_lines) for row in manifest.rows.values())
            raise DataError(
                f"{names}: no documents under {key!r} ({record.skipped_documents} empty ones, {lines} lines skipped); "
                "name files with text"
            )
    return records


def _write_records(
    config: PreprocessData, records: dict[str, TokensRecord], skipped_lines: list[str], job: Job
) -> None:
    path, learned = _path_beside(config, "skipped.txt"), _path_beside(config, "sentences.json")
    path.unlink(missing_ok=True)
    if job.splitter and job.splitter.saved_as:
        write_json(learned, job.splitter.parameters)
    elif Path(config.lang).absolute() != learned.absolute():
        learned.unlink(missing_ok=True)
    if skipped_lines:
        with replace_file(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in skipped_lines), encoding="utf-8")
        _logger.warning("%s: %d lines were left out; they are listed there", path, len(skipped_lines))
    inputs = [*config.input, config.tokenizer]
    for key, prefix in _name_outputs(config).items():
        counts = {**asdict(records[key]), "skipped_lines": len(skipped_lines), "backend": job.backend}
        write_stage(record_path(prefix), config=config, inputs=inputs, counts=counts)

"""A process that turns chunks of the input into parts of the output.

Started by ``crew.py``, which names the file descriptor of a connection. The worker receives a ``Job``, then ``Task``
after ``Task``, and answers each; when the connection ends, because the parent was killed, say, so does the worker.

1. ``encode_chunk`` reads the chunk, hashes it and parses its lines.
2. ``_ChunkEncoder`` encodes batches of a quarter of a megabyte, line by line where the tokenizer fails on one; with
   ``--split-sentences`` sentence by sentence (split.py).
3. ``PartWriter`` writes the ids, a file for every key.

Costs: besides the tokenizer, memory is the chunk and one batch.
"""

import hashlib
import io
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.corpus.chunks import Chunk
from megatron_adapt.corpus.documents import find_text, get_text, parse_line
from megatron_adapt.data.backend import Affixes, Backend, Encoder, load_encoder
from megatron_adapt.data.manifest import ChunkRow
from megatron_adapt.data.shards import PartWriter, part_path
from megatron_adapt.errors import DataError

if TYPE_CHECKING:  # nltk takes half a second to import
    from megatron_adapt.data.split import Cutter, Splitter

_BATCH_BYTES = 1 << 18
_SAMPLE_CHARACTERS = 2000
_NO_SAMPLE = 2.0
_Line = tuple[int, str, tuple[str | bytes, ...]]
"Number in the chunk, the prompt, and the text under every key, which begins with the prompt; a text may be UTF-8."


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is the same for all chunks."""

    folder: Path
    "Where parts are written."
    backend: Backend
    tokenizer_json: str
    affixes: Affixes
    dtype: str
    eod_id: int | None
    "Appended to every document."
    json_keys: tuple[str, ...]
    prompt_key: str
    "Key of a text in front of the others; nothing for none."
    skip_errors: bool
    splitter: "Splitter | None" = None
    "How documents are cut into sentences; None: they are not."


@dataclass(frozen=True)
class Task:
    """A chunk to encode, or to compare with what it was."""

    chunk: Chunk
    known_hash: str | None = None
    "Of a chunk that is done: nothing is written."
    is_careful: bool = False
    "Encode line by line and report each line before (``At``), to find the one that ends the process."


@dataclass(frozen=True)
class Done:
    """The parts are written."""

    row: ChunkRow
    sample: tuple[str, NDArray[Any]] | None
    "A text of the chunk and its ids, to be compared with those of ``tokenizers``."


@dataclass(frozen=True)
class Compared:
    """The answer to a task with a known hash."""

    is_same: bool


@dataclass(frozen=True)
class BadLine:
    """A line that is no document."""

    line: int
    "From 0, in the chunk."
    reason: str


@dataclass(frozen=True)
class Refused:
    """The chunk cannot be read."""

    message: str


@dataclass(frozen=True)
class NotWritten:
    """A part cannot be written."""

    reason: str


@dataclass(frozen=True)
class At:
    """The line that is encoded next."""

    line: int


Answer = Done | Compared | BadLine | Refused | NotWritten
Report = Callable[[At], None]


class _Encoded(NamedTuple):
    texts: list[str] | list[str | bytes]
    "What was encoded: documents, or their sentences."
    documents: list[NDArray[Any]]
    sentences: list[list[int]] | None
    "Ids in each sentence of each document."


class _LineError(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


def encode_chunk(job: Job, encode: Encoder, task: Task, report: Report, cut: "Cutter | None" = None) -> Answer:
    """Encode one chunk, or compare it with its known hash."""
    try:
        data = task.chunk.read()
        input_hash = hashlib.blake2b(data, digest_size=16).hexdigest()
        if task.known_hash is not None:
            return Compared(input_hash == task.known_hash)
        with ExitStack() as stack:
            dtype = np.dtype(job.dtype)
            ending = [] if job.eod_id is None else [job.eod_id]
            parts = [
                stack.enter_context(PartWriter(part_path(job.folder, task.chunk.number, at), dtype, ending))
                for at in range(len(job.json_keys))
            ]
            encoder = _ChunkEncoder(job, encode, task, report, parts, cut)
            num_lines = encoder.encode(data)
            row = ChunkRow(
                number=task.chunk.number,
                input_hash=input_hash,
                lines=num_lines,
                parts=tuple(part.finish() for part in parts),
                skipped_lines=tuple(sorted(encoder.skipped)),
            )
        return Done(row, encoder.sample)
    except _LineError as error:
        return BadLine(error.line, error.reason)
    except DataError as error:
        return Refused(str(error))
    except OSError as error:
        return NotWritten(error.strerror or str(error))


class _ChunkEncoder:
    def __init__(
        self, job: Job, encode: Encoder, task: Task, report: Report, parts: list[PartWriter], cut: "Cutter | None"
    ) -> None:
        self._job, self._encode, self._task, self._report, self._parts = job, encode, task, report, parts
        self._cut = cut
        self.skipped: list[tuple[int, str]] = []
        self.sample: tuple[str, NDArray[Any]] | None = None
        # gigatoken takes bytes; where that is all there is to a document, it is never made a string.
        is_plain = job.backend == "gigatoken" and len(job.json_keys) == 1 and not (job.prompt_key or cut)
        self._only_key = job.json_keys[0].encode(errors="surrogatepass") if is_plain else b""
        # A place in the chunk that differs from chunk to chunk.
        self._sample_share = task.chunk.number * 0.6180339887 % 1 if job.backend != "tokenizers" else _NO_SAMPLE

    def encode(self, data: bytes) -> int:
        """Encode all lines; return their number."""
        limit = 0 if self._task.is_careful else _BATCH_BYTES
        batch, batch_bytes, position, line = list[_Line](), 0, 0, -1
        for line, content in enumerate(io.BytesIO(data)):
            position += len(content)
            if content.isspace():
                continue
            try:
                batch.append((line, *self._parse(content)))
            except DataError as error:
                self._fail(line, str(error).removeprefix(": "))
                continue
            batch_bytes += len(content)
            if batch_bytes >= limit:
                self._encode_batch(batch, position / len(data))
                batch, batch_bytes = [], 0
        self._encode_batch(batch, 1.0)
        return line + 1

    def _parse(self, content: bytes) -> tuple[str, tuple[str | bytes, ...]]:
        if self._only_key and (text := find_text(content, self._only_key)) is not None:
            return "", (text,)
        document, key = parse_line(content, ""), self._job.prompt_key
        prompt = get_text(document, key, "") if key and key in document else ""
        return prompt, tuple(prompt + get_text(document, key, "") for key in self._job.json_keys)

    def _fail(self, line: int, reason: str) -> None:
        if not self._job.skip_errors:
            raise _LineError(line, reason)
        self.skipped.append((line, reason))

    def _encode_batch(self, batch: list[_Line], share_done: float) -> None:
        if not batch:
            return
        if self._task.is_careful:
            self._report(At(batch[0][0]))
        # Per key, the texts that are not empty, and their prompts.
        kept = [
            [(prompt, text) for _, prompt, texts in batch if (text := texts[at]) and not text.isspace()]
            for at in range(len(self._parts))
        ]
        texts = [[text for _, text in column] for column in kept]
        try:
            encoded = [self._encode_texts(column) for column in texts]
            prompts = [
                self._count_prompts([prompt for prompt, _ in column], item.documents)
                for column, item in zip(kept, encoded, strict=True)
            ]
            if self._sample_share <= share_done:
                self._take_sample(texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the libraries raise bare Exception, and panics that are not even that
            if len(batch) > 1:
                for line in batch:
                    self._encode_batch([line], share_done)
                return
            self._fail(batch[0][0], f"the tokenizer failed on the text ({error}); correct the text or the tokenizer")
            return
        for part, item, counts in zip(self._parts, encoded, prompts, strict=True):
            part.skip_documents(len(batch) - len(item.documents))
            # After encoding, which leaves the UTF-8 of a text in the object.
            num_bytes = sum(
                len(text if isinstance(text, bytes) or text.isascii() else text.encode()) for text in item.texts
            )
            part.add_documents(item.documents, counts, num_bytes, item.sentences)

    def _encode_texts(self, texts: list[str | bytes]) -> "_Encoded":
        if self._cut is None:
            return _Encoded(texts, self._encode(texts), None)
        cut = [self._cut(text) for text in texts if isinstance(text, str)]  # all are, see ``_only_key``
        flat = [sentence for sentences in cut for sentence in sentences]
        ids = iter(self._encode(flat))
        documents = [[next(ids) for _ in sentences] for sentences in cut]
        lengths = [[len(sentence) for sentence in document] for document in documents]
        return _Encoded(flat, [np.concatenate(document) for document in documents], lengths)

    def _count_prompts(self, prompts: list[str], documents: list[NDArray[Any]]) -> list[int]:
        """Count the tokens that a document has in common with its prompt alone.

        A token across the border belongs to the text: the model must learn to write it.
        """
        if not any(prompts):
            return [0] * len(prompts)
        alone = self._encode(prompts)
        return [
            _count_common(first, second) if prompt else 0
            for prompt, first, second in zip(prompts, alone, documents, strict=True)
        ]

    def _take_sample(self, texts: list[list[str | bytes]]) -> None:
        column = max(texts, key=len)
        if not column:
            return
        text = column[int(self._sample_share * len(column))]
        text = text.decode() if isinstance(text, bytes) else text
        start = int(self._sample_share * max(len(text) - _SAMPLE_CHARACTERS, 0))
        text = text[start : start + _SAMPLE_CHARACTERS]
        (ids,) = self._encode([text])
        self.sample = text, ids
        self._sample_share = _NO_SAMPLE


def _count_common(first: NDArray[Any], second: NDArray[Any]) -> int:
    """Return the length of the common beginning."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def _load_encoder(job: Job) -> Encoder:
    try:
        return load_encoder(job.backend, job.tokenizer_json, np.dtype(job.dtype), job.affixes)
    except Exception as error:  # the parent, which checks the backend at the same time, meets it too
        return _make_failing(error)


def _make_failing(error: Exception) -> Encoder:
    def encode(_: Sequence[str | bytes]) -> NoReturn:
        raise error

    return encode


def work(connection: Connection) -> None:
    """Answer tasks until the connection ends."""
    try:
        job: Job = connection.recv()
        encode = _load_encoder(job)
        cut = None
        if job.splitter is not None:
            from megatron_adapt.data.split import make_cutter

            cut = make_cutter(job.splitter)
        while True:
            task: Task = connection.recv()
            connection.send(encode_chunk(job, encode, task, connection.send, cut))
    except (EOFError, ConnectionError):
        return


def main() -> None:
    """Run a worker; its connection is the file descriptor named on the command line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    work(Connection(int(sys.argv[1])))

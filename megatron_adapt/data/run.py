"""Hand out the chunks of an input to workers and keep what they answer.

The first mistake *of the input* is reported, not the first that is met: chunks behind it are no longer handed out,
those before it are waited for.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from megatron_adapt.corpus.chunks import Chunk
from megatron_adapt.data.backend import BackendDiffersError, compare_ids
from megatron_adapt.data.crew import Ended, Worker, find_culprit, wait_for_answers
from megatron_adapt.data.manifest import Manifest
from megatron_adapt.data.shards import Joiner
from megatron_adapt.data.worker import Answer, BadLine, Compared, Done, Job, NotWritten, Refused, Task
from megatron_adapt.errors import DataError
from megatron_adapt.logs import Advance


class InputChangedError(DataError):
    """The input is not what it was when the unfinished run was begun."""


@dataclass(kw_only=True)
class Run:
    """One pass over the input."""

    job: Job
    tokenizer: Tokenizer
    "Of the ``tokenizers`` library."
    workers: Sequence[Worker]
    manifest: Manifest
    joiner: Joiner | None
    "None where everything was joined before."
    advance: Advance
    check: Callable[[], None]
    "What remains to be checked; done when the workers have their first chunks, before any answer counts."
    _fault: tuple[int, DataError] | None = None
    "The first mistake so far, and the number of its chunk."
    _files: list[tuple[Path, bool]] = field(default_factory=list)
    "By chunk, its file and whether it is the first one of it."
    _start: float = field(default_factory=time.monotonic)
    _num_documents: int = 0
    _num_tokens: int = 0
    _num_bytes: int = 0

    def encode_chunks(self, chunks: Iterator[Chunk]) -> None:
        """Encode all chunks that have no row; compare the others with their hash.

        Raises:
            DataError: a line is no document, a file is damaged, a worker has ended, the output cannot be written.
            InputChangedError: a chunk that is done is another now.
            BackendDiffersError: a sampled text has other ids than ``tokenizers`` gives it.
        """
        if self.joiner:
            self.joiner.join()
        ready = self._hand_out(self._take(chunks), chunks)
        self.check()
        while ready or self._is_waiting():
            for chunk, answer in wait_for_answers(self.workers):
                self._keep(chunk, answer)
            ready = None if self._fault else self._hand_out(ready, chunks)
        if self._fault:
            raise self._fault[1]
        if any(number >= len(self._files) for number in self.manifest.rows):
            raise self._tell_change("--input", "is shorter than it was")

    def _hand_out(self, ready: Chunk | None, chunks: Iterator[Chunk]) -> Chunk | None:
        """Give every idle worker a chunk; return the next one."""
        for worker in (worker for worker in self.workers if worker.task is None):
            if ready is not None:
                row = self.manifest.rows.get(ready.number)
                worker.give(Task(ready, row.input_hash if row else None))
                ready = self._take(chunks)
        return ready

    def _take(self, chunks: Iterator[Chunk]) -> Chunk | None:
        try:
            chunk = next(chunks, None)
        except DataError as error:  # what comes before the damage may hold an earlier mistake
            self._note_fault(len(self._files), error)
            return None
        if chunk is not None:
            self._files.append((chunk.path, chunk.start == 0))
        return chunk

    def _is_waiting(self) -> bool:
        busy = [worker.task.chunk.number for worker in self.workers if worker.task]
        return any(self._fault is None or number < self._fault[0] for number in busy)

    def _note_fault(self, number: int, error: DataError) -> None:
        if self._fault is None or number < self._fault[0]:
            self._fault = number, error

    def _keep(self, chunk: Chunk, answer: Answer | Ended) -> None:
        match answer:
            case Done():
                self._keep_row(answer)
            case Compared():
                if not answer.is_same:
                    raise self._tell_change(str(chunk.path), f"has changed near byte {chunk.start:,} of its text")
            case NotWritten():
                raise write_error(self.manifest.folder, answer.reason)
            case Refused():
                self._note_fault(chunk.number, DataError(answer.message))
            case BadLine():
                where = f"{chunk.path}:{chunk.count_lines_before() + answer.line + 1}"
                self._note_fault(chunk.number, DataError(f"{where}: {answer.reason}, or use --on-error skip"))
            case Ended():
                self._note_fault(chunk.number, self._explain_end(chunk, answer))
        self._show(chunk)

    def _keep_row(self, answer: Done) -> None:
        if answer.sample is not None:
            text, ids = answer.sample
            problem = compare_ids(self.tokenizer, [text], [ids])
            if problem:
                raise BackendDiffersError(problem)
        self.manifest.add_row(answer.row)
        for part in answer.row.parts:
            self._num_documents += part.documents
            self._num_tokens += part.tokens
            self._num_bytes += part.bytes
        assert self.joiner is not None
        self.joiner.join()

    def _tell_change(self, where: str, what: str) -> InputChangedError:
        return InputChangedError(
            f"{where}: {what} since {self.manifest.folder} was begun; restore it, or add --overwrite to begin anew"
        )

    def _explain_end(self, chunk: Chunk, ended: Ended) -> DataError:
        line = find_culprit(self.job, chunk)
        where = f"{chunk.path}:{chunk.count_lines_before() + (line or 0) + 1}"
        if line is not None:
            return DataError(
                f"{where}: the tokenizer ends its process on this text ({ended}); correct or remove the line"
            )
        return DataError(
            f"{where}: a worker was ended from outside ({ended}) on this line or one of the next, perhaps for lack of "
            "memory; use fewer --workers, the same command goes on"
        )

    def _show(self, chunk: Chunk) -> None:
        speed = self._num_bytes / 1e6 / (time.monotonic() - self._start)
        note = f"{speed:,.1f} MB/s of text, {self._num_documents:,} documents, {self._num_tokens:,} tokens"
        self.advance(chunk.file_bytes / 1e6, note)

    def list_skipped(self) -> Iterator[str]:
        """Yield ``file:line: reason`` of every line that was left out, in the order of the input."""
        lines_before = 0
        for number, (path, is_first) in enumerate(self._files):
            row = self.manifest.rows[number]
            lines_before = 0 if is_first else lines_before
            for line, reason in row.skipped_lines:
                yield f"{path}:{lines_before + line + 1}: {reason}"
            lines_before += row.lines


def write_error(where: Path, reason: str) -> DataError:
    """Return the error of an output that cannot be written."""
    return DataError(
        f"{where}: cannot be written ({reason}); make room or name another --output-prefix, the same command goes on "
        "with what is done"
    )

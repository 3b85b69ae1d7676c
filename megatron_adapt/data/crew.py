"""Worker processes as the parent sees them.

They are started as new programs, not forked: a forked child would inherit the threads of libraries in an unknown state,
and ``multiprocessing`` would import the caller's main module in every child. A connection that ends tells a worker that
its parent is gone, and the parent that a worker is.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from megatron_adapt.corpus.chunks import Chunk
from megatron_adapt.data.worker import Answer, At, Job, Task

_PROGRAM = "from megatron_adapt.data.worker import main; main()"
_ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Ended:
    """A worker ended before it answered."""

    code: int

    def __str__(self) -> str:
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"exit code {self.code}"


@dataclass
class Worker:
    """One process."""

    process: subprocess.Popen[bytes]
    connection: Any
    task: Task | None = None
    "What it is at work on."

    def give(self, task: Task) -> None:
        """Hand out a task."""
        self.task = task
        self.send(task)

    def send(self, value: Job | Task) -> None:
        """Send a message; that a worker has ended is seen when its answer is awaited."""
        try:
            self.connection.send(value)
        except ConnectionError:
            pass

    def receive(self) -> Answer | At | Ended:
        """Return its next message; waits."""
        try:
            message: Answer | At = self.connection.recv()
        except (EOFError, ConnectionError):
            return Ended(self.process.wait())
        return message


def _start_worker() -> Worker:
    ours, theirs = Pipe()
    with theirs:
        descriptor = theirs.fileno()
        # -P: a file in the current folder must not stand for a module.
        command = [sys.executable, "-P", "-c", _PROGRAM, str(descriptor)]
        process = subprocess.Popen(
            command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, env={**os.environ, **_ONE_THREAD}
        )
    return Worker(process, ours)


@contextmanager
def start_workers(number: int) -> Iterator[list[Worker]]:
    """Start processes, which import what they need meanwhile; they are gone when the block ends."""
    workers: list[Worker] = []
    try:
        for _ in range(number):
            workers.append(_start_worker())
        yield workers
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.wait()


def wait_for_answers(workers: Sequence[Worker]) -> Iterator[tuple[Chunk, Answer | Ended]]:
    """Wait until one or more of the busy workers have answered; yield their chunks and the answers."""
    busy = {worker.connection: worker for worker in workers if worker.task is not None}
    for connection in wait(list[Connection](busy)):
        worker = busy[connection]
        answer = worker.receive()
        assert worker.task is not None
        assert not isinstance(answer, At)
        chunk, worker.task = worker.task.chunk, None
        yield chunk, answer


def find_culprit(job: Job, chunk: Chunk) -> int | None:
    """Encode a chunk again, line by line, in a process of its own.

    Returns:
        The line, from 0, on which the process ended; None if it did not end this time.
    """
    with start_workers(1) as (worker,):
        worker.send(job)
        worker.give(Task(chunk, is_careful=True))
        line = None
        while isinstance(message := worker.receive(), At):
            line = message.line
        return line if isinstance(message, Ended) else None

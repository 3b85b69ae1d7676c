"""Text to .bin/.idx: ours beside Megatron-LM's structure, datatrove, and the bare encoders without reading or writing.

1. ``write_corpus``: JSON lines of an invented alphabet, or of ``--corpus``, a part from each, in one file per worker.
2. ``PATHS``: every way from there to ids. ``run_path`` gives each a process of its own and watches it and its children.
3. ``check_ids``: all give the same ids, or nothing is reported.

- ``megatron``: ``multiprocessing.Pool.imap`` over ``tokenizers``, one ``IndexedDatasetBuilder`` in the parent.
- ``datatrove``: ``JsonlReader`` and ``DocumentTokenizer``, a task per file; left out where it is not installed.
- ``encode_batch_fast``, ``encode_files``: what tokenizers and gigatoken need for the ids alone, with all cores.

Times count the starting of workers, not the imports of the first process; the bare ones count the encoding only.

``python benchmarks/preprocess.py [--quick] [--size MB] [--corpus FILE ...] [--tokenizer DIR] [--workers N]``
"""

import hashlib
import itertools
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, start_process
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_adapt.config import DataSettings, PreprocessData
from megatron_adapt.corpus.documents import limit_texts, read_texts
from megatron_adapt.data.backend import find_affixes
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.index import bin_path, token_dtype
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool
from megatron_adapt.tokenizer.pieces import read_tokenizer

MB, QUICK_MB = 50.0, 4.0
ROUNDS, QUICK_ROUNDS = 3, 2
DOCUMENT_WORDS = 500
PIECES = 8000
WATCH_SECONDS = 0.1
Measured = tuple[float, float, str]
"Seconds, peak of the process tree in MiB, hash of the ids."
Way = Callable[[list[Path], Path, Path, int], tuple[float, Callable[[], np.ndarray]]]
"Files, tokenizer, output and workers to the seconds it took, and what reads the ids."


def make_texts() -> Iterator[str]:
    """Yield texts of invented words in two scripts without end; words are as unequal as those of a language."""
    draw = random.Random(1)
    letters = ("abcdefghijklmnop", "абвгдежзиклмнопр")
    words = ["".join(draw.choices(draw.choice(letters), k=draw.randint(1, 10))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / (at + 10) for at in range(len(words))))
    while True:
        yield " ".join(draw.choices(words, cum_weights=weights, k=DOCUMENT_WORDS))


def write_corpus(folder: Path, num_bytes: float, corpora: list[Path], num_files: int) -> list[Path]:
    """Write about ``num_bytes`` of text to ``num_files`` files of about equal size."""
    share = int(num_bytes / max(len(corpora), 1))
    parts = [itertools.cycle(read_texts([path], "text")) for path in corpora] or [make_texts()]
    texts = [text for part in parts for text in limit_texts(part, share) if text.strip()]
    random.Random(1).shuffle(texts)
    paths = [folder / f"corpus-{at}.jsonl" for at in range(num_files)]
    for at, path in enumerate(paths):
        path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts[at::num_files]))
    return paths


def write_tokenizer(folder: Path) -> Path:
    """Learn a byte-level BPE tokenizer from the invented text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(itertools.islice(make_texts(), 200), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# ---------------------------------------------------------------- the paths


def run_ours(backend: str) -> Way:
    """Return the path through preprocess_data."""

    def run(inputs: list[Path], tokenizer: Path, output: Path, workers: int) -> tuple[float, Callable[[], np.ndarray]]:
        settings = DataSettings(workers=workers, append_eod=False, backend=backend)
        config = PreprocessData(input=tuple(inputs), tokenizer=tokenizer, output_prefix=output, settings=settings)
        start = time.perf_counter()
        preprocess_data(config)
        return time.perf_counter() - start, partial(np.fromfile, bin_path(output), read_dtype(tokenizer))

    return run


class Encoder:
    """As in Megatron-LM's ``preprocess_data.py``: a tokenizer a process, a call a line."""

    tokenizer: Tokenizer

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self) -> None:
        """Read the tokenizer in a worker."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        Encoder.tokenizer = read_tokenizer(self._folder).tokenizer

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        """Return the ids of a document, its lengths and the bytes read."""
        import json

        ids = Encoder.tokenizer.encode(json.loads(line)["text"]).ids
        return ids, [len(ids)], len(line)


def run_megatron(
    inputs: list[Path], tokenizer: Path, output: Path, workers: int
) -> tuple[float, Callable[[], np.ndarray]]:
    """Encode in a pool, line by line; one process writes."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encoder = Encoder(tokenizer)
    start = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=read_dtype(tokenizer).type)
    for path in inputs:
        with path.open(encoding="utf-8") as lines, multiprocessing.Pool(workers, encoder.start) as pool:
            for ids, lengths, _ in pool.imap(encoder.encode, lines, 32):
                builder.add_document(ids, lengths)
    builder.finalize(f"{output}.idx")
    return time.perf_counter() - start, partial(np.fromfile, f"{output}.bin", read_dtype(tokenizer))


def run_datatrove(
    inputs: list[Path], tokenizer: Path, output: Path, workers: int
) -> tuple[float, Callable[[], np.ndarray]]:
    """Encode a file a task."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()
    start = time.perf_counter()
    steps = [
        JsonlReader(str(inputs[0].parent), glob_pattern="corpus-*.jsonl"),
        DocumentTokenizer(str(output), str(tokenizer / "tokenizer.json"), shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=len(inputs), workers=workers, logging_dir=f"{output}.logs").run()
    seconds = time.perf_counter() - start
    return seconds, lambda: np.concatenate([np.fromfile(path, "<u2") for path in sorted(output.glob("*.ds"))])


def run_encode_batch_fast(
    inputs: list[Path], tokenizer: Path, _: Path, workers: int
) -> tuple[float, Callable[[], np.ndarray]]:
    """Encode texts that are in memory."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(workers)}
    encode, dtype = read_tokenizer(tokenizer).tokenizer.encode_batch_fast, read_dtype(tokenizer)
    texts = list(read_texts(inputs, "text"))
    found, seconds = [], 0.0
    for batch in (texts[at : at + 1000] for at in range(0, len(texts), 1000)):
        start = time.perf_counter()
        encodings = encode(batch)
        seconds += time.perf_counter() - start
        found += [np.array(encoding.ids, dtype) for encoding in encodings]
    return seconds, partial(np.concatenate, found)


def run_encode_files(
    inputs: list[Path], tokenizer: Path, _: Path, workers: int
) -> tuple[float, Callable[[], np.ndarray]]:
    """Let gigatoken read and encode the files."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    import gigatoken

    library = read_tokenizer(tokenizer).tokenizer
    fast = gigatoken.Tokenizer.from_json(library.to_str())
    fast.encode_batch(["a"])  # imports what it returns
    start = time.perf_counter()
    found = fast.encode_files(gigatoken.JsonlFileSource(inputs))
    seconds = time.perf_counter() - start
    head, tail = find_affixes(library)
    return seconds, lambda: np.concatenate([part for ids in found for part in (head, np.asarray(ids), tail)])


def list_paths(dtype: np.dtype[Any]) -> tuple[dict[str, Way], list[tuple[str, str]]]:
    """Return the paths that can run here, and which peer is compared with which of ours."""
    paths = {"ours": run_ours("tokenizers"), "megatron": run_megatron, "encode_batch_fast": run_encode_batch_fast}
    pairs = [("megatron", "ours"), ("encode_batch_fast", "ours")]
    if find_spec("gigatoken"):
        paths |= {"ours gigatoken": run_ours("gigatoken"), "encode_files": run_encode_files}
        pairs += [("megatron", "ours gigatoken"), ("encode_files", "ours gigatoken")]
    if find_spec("datatrove") and dtype.itemsize == 2:
        paths["datatrove"] = run_datatrove
        pairs += [("datatrove", ours) for ours in paths if ours.startswith("ours")]
    return paths, pairs


def list_left_out(paths: dict[str, Way]) -> Iterator[str]:
    """Yield why paths are left out."""
    if "encode_files" not in paths:
        yield "gigatoken is not installed: its paths are left out"
    if "datatrove" not in paths:
        yield "datatrove is left out: not installed, or the vocabulary needs more than its two bytes for an id"


def read_dtype(tokenizer: Path) -> np.dtype[Any]:
    """Return the type of an id on disk."""
    return token_dtype(read_tokenizer(tokenizer).vocab_size)


# ---------------------------------------------------------------- measuring


def run_path(name: str, inputs: list[Path], tokenizer: Path, workers: int) -> Measured:
    """Run a path in a new process; watch the memory of it and all its children."""
    with tempfile.TemporaryDirectory(dir=inputs[0].parent) as folder, start_process() as process:
        pid = process.submit(os.getpid).result()
        peak, stop = [0.0], threading.Event()
        watcher = threading.Thread(target=watch_memory, args=(pid, peak, stop))
        watcher.start()
        try:
            seconds = process.submit(call_path, name, inputs, tokenizer, Path(folder) / "tokens", workers).result()
        finally:
            stop.set()
            watcher.join()
        return seconds, peak[0], process.submit(hash_ids).result()


_last: list[Callable[[], np.ndarray]] = []
"What reads the ids of the path that this process has run."


def call_path(name: str, inputs: list[Path], tokenizer: Path, output: Path, workers: int) -> float:
    """Run a path here; return the seconds it took."""
    paths, _ = list_paths(read_dtype(tokenizer))
    seconds, read = paths[name](inputs, tokenizer, output, workers)
    _last[:] = [read]
    return seconds


def hash_ids() -> str:
    """Return the hash of the ids that ``call_path`` gave."""
    return hashlib.blake2b(_last[0]().astype(np.int32).data).hexdigest()


def watch_memory(pid: int, peak: list[float], stop: threading.Event) -> None:
    """Keep the highest sum of memory of a process and its children in ``peak``, in MiB."""
    root = psutil.Process(pid)
    while not stop.wait(WATCH_SECONDS):
        with suppress(psutil.Error):
            total = sum(read_memory(item) for item in [root, *root.children(recursive=True)])
            peak[0] = max(peak[0], total / (1 << 20))


def read_memory(process: psutil.Process) -> int:
    """Return the resident bytes of a process; of pages that several share, its part where the kernel tells."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    with suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def check_ids(digests: dict[str, str]) -> None:
    """Refuse to report where paths differ.

    Raises:
        EngineError: a path gives other ids than ours.
    """
    others = sorted(name for name, digest in digests.items() if digest != digests["ours"])
    if others:
        raise EngineError(f"preprocess: {', '.join(others)} gives other ids than ours; do not compare their times")


def run(size: float, num_rounds: int, corpora: list[Path], tokenizer: Path | None, workers: int) -> None:
    """Measure all paths and print them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = write_corpus(folder, size * 1e6, corpora, workers)
        tokenizer = tokenizer or write_tokenizer(folder / "tokenizer")
        megabytes = sum(len(text.encode()) for text in read_texts(inputs, "text")) / 1e6
        paths, pairs = list_paths(read_dtype(tokenizer))
        for reason in list_left_out(paths):
            print(reason)
        rounds: dict[str, list[Measured]] = {path: [] for path in paths}
        for at in range(num_rounds):
            for path in list(paths)[:: -1 if at % 2 else 1]:
                rounds[path].append(run_path(path, inputs, tokenizer, workers))
    check_ids({path: found[0][2] for path, found in rounds.items()})
    seconds = {path: [found[0] for found in measured] for path, measured in rounds.items()}
    figures = {
        path: {"mb_per_second": megabytes / min(seconds[path]), "peak_mib": max(found[1] for found in measured)}
        for path, measured in rounds.items()
    }
    print(f"{megabytes:.1f} MB of text, {workers} workers, best round")
    print_table(("path", "MB/s", "peak MiB"), [(path, *item.values()) for path, item in figures.items()])
    cases = [{"case": f"{peer} / {ours}", "time_ratio": compare(seconds, peer, ours)} for peer, ours in pairs]
    print_table(
        ("peer / ours", "time ratio (range)"), [(item["case"], show_ratio(item["time_ratio"])) for item in cases]
    )
    shared = {"mb": size, "real_text": bool(corpora), "workers": workers, "rounds": num_rounds}
    print_figures("preprocess", ("tokenizers", "megatron-core"), {**shared, "paths": figures, "cases": cases})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=MB, unit="MB of text")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="documents to read, as much of each")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer, instead of one learned here")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (number of cores)")
    arguments = parser.parse_args()
    quick = arguments.quick
    run_tool(
        run,
        arguments.size or (QUICK_MB if quick else MB),
        arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        arguments.corpus,
        arguments.tokenizer,
        arguments.workers,
    )

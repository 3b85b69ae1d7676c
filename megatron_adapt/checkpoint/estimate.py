"""What a conversion or a resize will take: bytes, files, memory, and time at the measured speed of the two disks.

``write_estimate`` reads a sample of the source past the file cache and writes it to a file without a name beside the
output, which is gone when it is closed. Cost: the time of 256 MiB.
"""

import contextlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_adapt.checkpoint.archive import ALIGNMENT
from megatron_adapt.checkpoint.dist import MAX_FILE_BYTES
from megatron_adapt.checkpoint.layout import list_extra_states
from megatron_adapt.checkpoint.resume import check_space, count_free_bytes, find_existing
from megatron_adapt.checkpoint.slices import CHUNK_BYTES, NUM_THREADS, SLICE_BYTES
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.files import check_output

_SAMPLE_BYTES = 256 << 20
_SMALL_FILES_BYTES = 1 << 20
"Config, index, record; a tokenizer is larger, but small beside any model."
_COPIES_OF_A_SLICE = 3
"As it was read, cast, and what the allocator keeps."


def count_dist_bytes(specs: Mapping[str, TensorSpec], num_layers: int) -> int:
    """Return about how many bytes a ``torch_dist`` folder of these tensors takes."""
    num_chunks = sum(spec.num_bytes // CHUNK_BYTES + num_layers for spec in specs.values())
    around = 2 * num_chunks + len(list_extra_states(num_layers))
    return count_hf_bytes(specs) + around * ALIGNMENT


def count_hf_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Return about how many bytes a Hugging Face folder of these tensors takes."""
    return sum(spec.num_bytes for spec in specs.values()) + _SMALL_FILES_BYTES


def count_dist_files(num_bytes: int) -> int:
    """Return how many ``.distcp`` files hold so many bytes."""
    return -(-num_bytes // MAX_FILE_BYTES)


def write_estimate(
    title: str,
    files: Sequence[Path],
    output: Path,
    *,
    overwrite: bool,
    num_bytes: int,
    num_files: int,
    work_bytes: int = 0,
) -> None:
    """Print what the work will take.

    Args:
        title: the work in a few words.
        files: files of weights that it reads.
        output: folder that it writes.
        overwrite: whether it may replace that folder.
        num_bytes: what it writes.
        num_files: files of weights that it writes.
        work_bytes: memory it takes beyond slices.

    Raises:
        ConfigError: the output exists, or there is too little space.
    """
    check_output(output, overwrite=overwrite)
    check_space(output, num_bytes)
    read_bytes = sum(file.stat().st_size for file in files)
    speed = measure_speed(files, output)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + _COPIES_OF_A_SLICE * NUM_THREADS * SLICE_BYTES
    lines = (
        f"{title}, a dry run: nothing is written",
        f"read   {read_bytes / 1e9:.3f} GB in {len(files)} files",
        f"write  {num_bytes / 1e9:.3f} GB in {num_files} files of weights to {output}",
        f"free   {count_free_bytes(output) / 1e9:.3f} GB",
        f"memory {(memory + work_bytes) / 1e9:.2f} GB",
        f"time   {num_bytes / speed:,.0f} s at {speed / 1e9:.2f} GB/s, measured by copying a sample to disk",
    )
    sys.stdout.write("\n".join(lines) + "\n")


def measure_speed(files: Sequence[Path], output: Path) -> float:
    """Return the bytes per second of copying a sample of the files to the disk of the output."""
    done, start = 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=find_existing(output)) as target:
        for path in files:
            with path.open("rb", buffering=0) as source:
                with contextlib.suppress(OSError):  # some file systems cannot forget; then the cache is measured too
                    os.posix_fadvise(source.fileno(), 0, _SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
                while done < _SAMPLE_BYTES and (block := source.read(SLICE_BYTES)):
                    target.write(block)
                    done += len(block)
        target.flush()
        os.fdatasync(target.fileno())
    return max(1, done) / (time.perf_counter() - start)

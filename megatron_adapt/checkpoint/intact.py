"""Whether the files of a checkpoint are those that were saved: sizes and SHA-256 of all, in ``files.json``.

Writes: ``files.json`` in an iteration, as the last of its files; while they are written, ``.sums-RANK.json`` of the
files of each rank. Guarantees: a file that is cut off, changed or gone is named before any of it is used. A folder
without ``files.json`` is of another program or an earlier version, and says nothing.

1. ``sum_own_files``: a rank hashes what it wrote, from the file cache;
2. ``record_files``: one rank joins these with the hashes of the small files;
3. ``find_wrong_size``, ``find_wrong_content``: compare.

Cost: SHA-256 takes 1.5 GB a second and thread; nobody hashes what another rank wrote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_adapt.checkpoint.sums import hash_files
from megatron_adapt.errors import CheckpointError, DataError
from megatron_adapt.files import read_json, sync_file, write_json

FILES_FILE = "files.json"
_SUMS = ".sums-{}.json"


@dataclass(frozen=True)
class SavedFile:
    """What a file was when the checkpoint was saved.

    Attributes:
        num_bytes: its size.
        sha256: its digest, in hexadecimal digits.
    """

    num_bytes: int
    sha256: str


def sum_own_files(folder: Path, rank: int) -> None:
    """Hash the ``.distcp`` files that a rank wrote, as the engine names them, and note the digests beside them."""
    write_json(folder / _SUMS.format(rank), _sum_files(sorted(folder.glob(f"__{rank}_*.distcp"))))


def record_files(folder: Path) -> None:
    """Write ``files.json``: what the ranks noted, and all files that nobody noted, which are put on disk."""
    saved: dict[str, SavedFile] = {}
    for noted in sorted(folder.glob(_SUMS.format("*"))):
        saved.update(_read_sums(noted))
        noted.unlink()
    rest = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in saved)
    for path in rest:
        sync_file(path)
    saved.update(_sum_files(rest))
    write_json(folder / FILES_FILE, dict(sorted(saved.items())))


def read_record(folder: Path) -> dict[str, SavedFile]:
    """Read ``files.json``; empty where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / FILES_FILE
    if not path.is_file():
        return {}
    try:
        return _read_sums(path)
    except (DataError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def find_wrong_size(folder: Path, record: Mapping[str, SavedFile]) -> str:
    """Return which file is missing or has another size than it was saved with; empty where there is none."""
    for name, saved in record.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        size = path.stat().st_size
        if size != saved.num_bytes:
            return f"{path}: {size} bytes, but {saved.num_bytes} were saved"
    return ""


def find_wrong_content(folder: Path, record: Mapping[str, SavedFile], names: Sequence[str]) -> str:
    """Read some files; return which of them cannot be read or is not what was saved, empty where all are."""
    try:
        found = _sum_files([folder / name for name in names])
    except OSError as error:
        return f"{error.filename or folder}: cannot be read ({error.strerror})"
    wrong = [name for name in names if found[name] != record[name]]
    return f"{folder / wrong[0]}: not the bytes that were saved (SHA-256)" if wrong else ""


def _sum_files(files: list[Path]) -> dict[str, SavedFile]:
    digests = zip(files, hash_files(files), strict=True)
    return {path.name: SavedFile(path.stat().st_size, digest) for path, digest in digests}


def _read_sums(path: Path) -> dict[str, SavedFile]:
    return {name: SavedFile(**saved) for name, saved in read_json(path).items()}

"""Names of inputs to files: a file, a folder, or a pattern such as ``'raw/*.jsonl.gz'``."""

from collections.abc import Iterable
from pathlib import Path

from megatron_adapt.config.corpus import PlainText
from megatron_adapt.errors import DataError

_FORMATS, _PACKED = (".jsonl", ".parquet"), (".gz", ".zst", ".xz")


def find_files(inputs: Iterable[Path], setting: str, plain_text: PlainText = "none") -> tuple[Path, ...]:
    """Return the files of all inputs, in this order; those of a folder or a pattern sorted by path.

    A folder gives the files below it that are called ``.jsonl`` or ``.parquet``, and ``.txt`` where ``plain_text`` says
    what a document is in them, each also with ``.gz``, ``.zst`` or ``.xz``. A pattern gives all files it fits.

    Raises:
        DataError: an input is missing, or there are no files in it.
    """
    formats = _FORMATS if plain_text == "none" else (*_FORMATS, ".txt")
    endings = tuple(f"{name}{packed}" for name in formats for packed in ("", *_PACKED))
    files: list[Path] = []
    for path in inputs:
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted(item for item in path.rglob("*") if item.name.endswith(endings) and item.is_file())
            if not found:
                hint = ", or .txt with --plain-text" if plain_text == "none" else ""
                raise DataError(f"{setting}: {path} holds no {', '.join(formats)}{hint}; name the files or a pattern")
            files += found
        elif set(str(path)) & set("*?["):
            found = sorted(
                item for item in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if item.is_file()
            )
            if not found:
                raise DataError(f"{setting}: no file fits {path}; check the pattern")
            files += found
        else:
            raise DataError(f"{setting}: {path} is not a file; check the path")
    return tuple(files)

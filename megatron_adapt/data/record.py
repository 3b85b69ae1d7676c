"""What is known about tokenised documents besides the ids: the counts in PREFIX.stage.json."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_adapt.data.index import bin_path, idx_path
from megatron_adapt.data.prompts import prompts_path
from megatron_adapt.errors import DataError
from megatron_adapt.files import STAGE_FILE, fingerprint, read_json

_NUM_SAMPLES, _SAMPLE_BYTES = 16, 1 << 12
"Few and small, for blends of thousands of sources; a file that was written anew differs everywhere."


@dataclass(frozen=True, kw_only=True)
class TokensRecord:
    """The counts of one PREFIX.bin."""

    documents: int
    "Documents in the files."
    skipped_documents: int
    "Documents that were left out because they are empty."
    tokens: int
    "Ids in the files, special tokens included."
    bytes: int
    "Bytes of the documents' text in UTF-8."
    tokenizer_fingerprint: str
    "Fingerprint of the tokenizer that made the ids."
    vocab_size: int
    "Size of its vocabulary; every id is below."
    eod_id: int | None
    "Id of its end-of-document token, whether it was appended or not."

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text a token stands for; turns a loss per token into one per byte."""
        return self.bytes / self.tokens


def record_path(prefix: Path) -> Path:
    """Return the stage record of a tokens prefix."""
    return prefix.with_name(f"{prefix.name}.{STAGE_FILE}")


def read_record(prefix: Path) -> TokensRecord:
    """Read the counts of a tokens prefix.

    Raises:
        DataError: the record is missing, damaged or of another stage.
    """
    path = record_path(prefix)
    if not path.is_file():
        raise DataError(f"{path}: no such file; tokenise the corpus with tools/preprocess_data.py")
    stored = read_json(path)
    counts = stored.get("counts") if isinstance(stored, Mapping) else None
    names = [item.name for item in fields(TokensRecord)]
    missing = [name for name in names if not isinstance(counts, Mapping) or name not in counts]
    if missing or not isinstance(counts, Mapping):
        raise DataError(
            f"{path}: no counts of {', '.join(missing)}; tokenise the corpus again with tools/preprocess_data.py"
        )
    values: dict[str, Any] = {name: counts[name] for name in names}
    return TokensRecord(**values)


def read_appended_eod(prefix: Path) -> int | None:
    """Return the id that ends every document of a tokens prefix; None if documents were written without one."""
    record, config = read_record(prefix), read_json(record_path(prefix)).get("config")
    settings = config.get("settings") if isinstance(config, Mapping) else None
    return record.eod_id if isinstance(settings, Mapping) and settings.get("append_eod") else None


def read_cut(prefix: Path) -> dict[str, bool]:
    """Return how the documents of a tokens prefix were cut into sentences: ``split_sentences``, ``keep_newlines``."""
    config = read_json(record_path(prefix)).get("config")
    asked = config if isinstance(config, Mapping) else {}
    return {name: bool(asked.get(name)) for name in ("split_sentences", "keep_newlines")}


def data_fingerprint(prefix: Path) -> str:
    """Return a hash of the files' contents (16 samples of 4 KiB each); it does not depend on their place."""
    paths = [idx_path(prefix), bin_path(prefix), prompts_path(prefix)]
    return "-".join(fingerprint(path, _NUM_SAMPLES, _SAMPLE_BYTES) for path in paths if path.exists())

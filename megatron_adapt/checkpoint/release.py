"""Release a Hugging Face folder: its checksums, and the way to the Hub.

Reads: a folder that ``tools/convert_checkpoint.py`` or ``tools/adapt.py`` wrote, or any other. Writes:
``SHA256SUMS`` in it, as ``sha256sum -c`` reads it. Guarantees: what is pushed is what was written, file by file; never
a pickle, nor a record of the machine (``stage.json``).

1. ``check_release``: complete safetensors, a tokenizer that fits, no file that is read by unpickling;
2. ``sum_files``: hash every file; a listed one that changed or is gone is refused, a new one is added;
3. ``push_folder``: create the repository, private unless told otherwise, and upload the files that were hashed.

Cost: one read of the folder, two files at a time; upload by ``huggingface_hub``, which sends no file twice.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_adapt.checkpoint.card import CARD_FILE, OPEN
from megatron_adapt.checkpoint.companions import check_import_vocab, find_tokenizer
from megatron_adapt.checkpoint.hf import HFFolder, read_hf_shape
from megatron_adapt.checkpoint.layout import check_hf_tensors
from megatron_adapt.checkpoint.sums import hash_files
from megatron_adapt.config import ReleaseModel
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.files import STAGE_FILE, replace_file
from megatron_adapt.logs import show_progress

SUMS_FILE = "SHA256SUMS"
_NOT_SUMMED = {CARD_FILE, SUMS_FILE, STAGE_FILE}
"The card is made to be edited; the record stays at home."
_PICKLES = (".bin", ".ckpt", ".distcp", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_logger = logging.getLogger(__name__)


def release_model(config: ReleaseModel) -> None:
    """Check a folder, write or compare its checksums, and push it if a repository is named.

    Raises:
        CheckpointError: the folder is incomplete, holds a pickle, or is not what its checksums say.
        ConfigError: the Hub cannot be reached or refuses, or a public card has open fields.
    """
    check_release(config.model)
    names = sum_files(config.model)
    _logger.info("%s: %d files, as %s says", config.model, len(names), SUMS_FILE)
    if config.push_to_hub:
        if config.public:
            _check_card(config.model)
        travelling = [name for name in (CARD_FILE, SUMS_FILE) if (config.model / name).is_file()]
        push_folder(config.model, [*names, *travelling], config.push_to_hub, private=not config.public)


def _check_card(folder: Path) -> None:
    card = folder / CARD_FILE
    if not card.is_file() or OPEN in card.read_text(encoding="utf-8"):
        raise ConfigError(
            f"{card}: missing, or its fields are still open, such as the licence; fill them in, or push to a private "
            "repository"
        )


def check_release(folder: Path) -> None:
    """Refuse a folder that others could not use, or should not trust.

    Raises:
        CheckpointError: a tensor is missing, the tokenizer is larger than the model, or there is a pickle.
    """
    for file in sorted(folder.rglob("*")):
        if file.suffix in _PICKLES:
            raise CheckpointError(
                f"{file}: is read by unpickling, which runs code of whoever wrote it; remove it, the weights are in "
                "safetensors"
            )
    shape, source = read_hf_shape(folder), HFFolder(folder)
    check_hf_tensors({name: source.shape(name) for name in source.names}, shape, str(folder))
    check_import_vocab(find_tokenizer(None, folder), shape.vocab_size, folder)


def sum_files(folder: Path, known: Mapping[str, str] | None = None) -> list[str]:
    """Compare the files of a folder with its ``SHA256SUMS``, write that where it is missing or lacks files.

    Args:
        folder: the model.
        known: SHA-256 of files that were hashed while they were written, by name.

    Returns:
        Names of the files it covers, relative to the folder.

    Raises:
        CheckpointError: a file that it names is another one, or gone.
    """
    names = sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and _is_summed(file, folder)
    )
    found = dict(known or {})
    unknown = [name for name in names if name not in found]
    found.update(zip(unknown, _hash_files([folder / name for name in unknown]), strict=True))
    said = _read_sums(folder / SUMS_FILE)
    for name, digest in said.items():
        if found.get(name) != digest:
            what = "is gone" if name not in found else "is not the file"
            raise CheckpointError(
                f"{folder / name}: {what} that {SUMS_FILE} names; restore it, or remove {SUMS_FILE} if that is meant"
            )
    if found != said:
        with replace_file(folder / SUMS_FILE) as partial:
            lines = (f"{found[name]}  {name}\n" for name in names)
            partial.write_text("".join(lines), encoding="utf-8")
    return names


def _is_summed(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    return not any(part.startswith(".") for part in parts) and parts[0] not in _NOT_SUMMED


def _read_sums(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    if any(len(line) != 2 for line in lines):
        raise CheckpointError(f"{path}: a line is no checksum and name; remove the file to have it written anew")
    return {name: digest for digest, name in lines}


def _hash_files(files: Sequence[Path]) -> list[str]:
    total = sum(file.stat().st_size for file in files) / 1e6
    digests = []
    with show_progress("checksums", total, "MB") as advance:
        for file, digest in zip(files, hash_files(files), strict=True):
            digests.append(digest)
            advance(file.stat().st_size / 1e6)
    return digests


def push_folder(folder: Path, names: Sequence[str], repository: str, *, private: bool) -> None:
    """Upload files of a folder to the Hub.

    Args:
        folder: where they are.
        names: relative to it.
        repository: USER/NAME; made if missing.
        private: whether it is made private; one that is there stays as it is, and where it is public the model card
            must have no open fields.

    Raises:
        ConfigError: no ``huggingface_hub``, no token, or the Hub refuses.
    """
    try:
        # Only here is it needed, and it reads settings and tokens of the user when it is imported.
        from huggingface_hub import HfApi, get_token
    except ImportError:
        raise ConfigError("--push-to-hub: huggingface_hub is missing; pip install huggingface_hub") from None
    if get_token() is None:
        raise ConfigError("--push-to-hub: no token of the Hub; run `hf auth login`, or set HF_TOKEN, and start again")
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if not api.repo_info(repository).private:
            _check_card(folder)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            allow_patterns=list(names),
            commit_message="Upload the files of SHA256SUMS",
        )
    except ConfigError:
        raise
    except Exception as error:  # those of its HTTP library have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--push-to-hub: {repository}: {reason}; start again when that is mended, no file is sent twice"
        ) from error
    _logger.info("pushed %s to %s", folder, repository)

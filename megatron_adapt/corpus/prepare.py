"""Split raw documents of one language into a training and a validation part.

Reads: JSON lines, parquet or plain text, also compressed. Writes: ``train-00000.jsonl.zst`` and
``valid-00000.jsonl.zst`` with one ``{"id", "text"}`` a line (and ``"sentences"`` when asked), and ``stage.json`` with
the counts by reason.

Guarantees: a text occurs once in the whole output (with ``near_duplicates``, nearly the same text too); whether a
document is training or validation depends on its id alone, so appending files moves none, and translations under one
id fall on the same side in every language.

Method, one pass in file order:

1. ``name_document`` finds the id (a hash of the text where there is none);
2. ``_decide`` drops empty texts, those that a rule refuses (``clean.RULES``), exact duplicates and near ones
   (``duplicates``), splits the rest with ``is_validation``, and closes the training part at ``max_bytes``;
3. every decision is counted by reason.

Cost: one read and one write of the text; memory about 120 bytes for every distinct text (its hash).
"""

import hashlib
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex

from megatron_adapt.config import PrepareCorpus
from megatron_adapt.corpus.clean import RULES, Limits, find_reason, normalise
from megatron_adapt.corpus.documents import DocumentWriter, get_text, limit_texts, read_documents, read_texts
from megatron_adapt.corpus.duplicates import NearDuplicates
from megatron_adapt.corpus.inputs import find_files
from megatron_adapt.corpus.sentences import (
    SentenceSplitter,
    learn_splitter,
    read_installed_splitter,
    write_splitter,
)
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import STAGE_FILE, replace_folder, write_stage
from megatron_adapt.logs import show_progress
from megatron_adapt.scripts import make_script_class

_logger = logging.getLogger(__name__)

TRAIN_FILE = "train-00000.jsonl.zst"
VALID_FILE = "valid-00000.jsonl.zst"
SENTENCES_FILE = "sentences.json"
LEARNED = "learned"
_LEARNING_BYTES = 50_000_000

_DROPPED = ("empty", *RULES, "duplicate", "near_duplicate")
_REASONS = ("train", "valid", *_DROPPED, "over_max_bytes")


@dataclass
class _State:
    """What has been read so far."""

    limits: Limits
    near: NearDuplicates | None
    seen: set[bytes] = field(default_factory=set)
    closed: bool = False
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_REASONS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_REASONS, 0))


def prepare_corpus(config: PrepareCorpus) -> None:
    """Write the training and the validation part of ``config.input`` to ``config.output``.

    Raises:
        ConfigError: the output exists and ``overwrite`` is off, or a setting lacks the language's scripts.
        DataError: an input is missing or damaged, a line is no document, or a part would be empty.
    """
    paths = find_files(config.input, "--input", config.settings.plain_text)
    if config.settings.min_script_share and not config.scripts:
        raise ConfigError("prepare.min_script_share: the language's scripts are not named; add --scripts Arabic")
    with replace_folder(config.output, overwrite=config.overwrite) as folder:
        state = _split(config, paths, folder)
        _check_parts(state, config)
        counts = {"documents": state.documents, "bytes": state.bytes}
        folders = filter(Path.is_dir, config.input)  # a file that is added later changes them
        write_stage(folder / STAGE_FILE, config=config, inputs=[*paths, *folders], counts=counts)
    _logger.info(
        "%s: %s training documents (%.1f MB), %s validation documents; dropped: %s",
        config.output,
        f"{state.documents['train']:,}",
        state.bytes["train"] / 1e6,
        f"{state.documents['valid']:,}",
        ", ".join(f"{state.documents[name]:,} {name}" for name in _REASONS[2:] if state.documents[name]) or "none",
    )


def is_validation(name: str, valid_share: float) -> bool:
    """Tell whether the document called ``name`` is held out.

    A hash of the name, uniform in [0, 1), is compared with ``valid_share``: a larger share only adds documents.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < valid_share * 2**64


def _split(config: PrepareCorpus, paths: tuple[Path, ...], folder: Path) -> _State:
    settings = config.settings
    state = _State(
        limits=Limits(settings, _make_script(config.scripts)),
        near=NearDuplicates(settings.near_duplicates) if settings.near_duplicates else None,
    )
    with ExitStack() as stack:
        writers = {
            "train": stack.enter_context(DocumentWriter(folder / TRAIN_FILE)),
            "valid": stack.enter_context(DocumentWriter(folder / VALID_FILE)),
        }
        splitter = _make_splitter(config, paths, folder)
        advance = stack.enter_context(show_progress("preparing the corpus", None, "documents"))
        for where, document in read_documents(paths, settings.plain_text):
            text = normalise(get_text(document, settings.text_key, where), settings)
            data = text.encode()
            name = name_document(document, settings.id_key, data, where)
            reason = _decide(name, text, data, state)
            state.documents[reason] += 1
            state.bytes[reason] += len(data)
            if reason in writers:
                sentences = {"sentences": splitter.split(text)} if splitter else {}
                writers[reason].write({"id": name, "text": text, **sentences})
            advance()
    return state


def _make_splitter(config: PrepareCorpus, paths: tuple[Path, ...], folder: Path) -> SentenceSplitter | None:
    name = config.settings.sentences
    if name != LEARNED:
        return read_installed_splitter(name) if name else None
    settings = config.settings
    texts = limit_texts(read_texts(paths, settings.text_key, settings.plain_text), _LEARNING_BYTES)
    splitter = learn_splitter(normalise(text, settings) for text in texts)
    write_splitter(splitter, folder / SENTENCES_FILE)
    return splitter


def _make_script(scripts: tuple[str, ...]) -> regex.Pattern[str] | None:
    return regex.compile(f"[{make_script_class(scripts, '--scripts')}]") if scripts else None


def name_document(document: dict[str, Any], id_key: str, data: bytes, where: str) -> str:
    """Return the id of a document, or a hash of its ``data`` where it has none.

    Raises:
        DataError: the id is neither a string nor a number.
    """
    name = document.get(id_key)
    if name is None:
        return hashlib.blake2b(data, digest_size=16).hexdigest()
    if isinstance(name, str | int):
        return str(name)
    raise DataError(f"{where}: {id_key!r} is {type(name).__name__}, not a string or number; correct the line")


def _decide(name: str, text: str, data: bytes, state: _State) -> str:
    settings = state.limits.settings
    if not text or text.isspace():
        return "empty"
    refused = find_reason(text, state.limits)
    if refused:
        return refused
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if digest in state.seen:
        return "duplicate"
    state.seen.add(digest)
    if state.near and not state.near.add(text):
        return "near_duplicate"
    if is_validation(name, settings.valid_share):
        return "valid"
    # The part closes at the first document that does not fit: later, shorter ones would make it a biased sample.
    if settings.max_bytes and state.bytes["train"] + len(data) > settings.max_bytes:
        state.closed = True
    return "over_max_bytes" if state.closed else "train"


def _check_parts(state: _State, config: PrepareCorpus) -> None:
    where = ", ".join(map(str, config.input))
    num_documents = sum(state.documents.values())
    dropped = {name: state.documents[name] for name in _DROPPED if state.documents[name]}
    kept = num_documents - sum(dropped.values())
    if not num_documents:
        raise DataError(f"{where}: no documents; give files with one JSON object a line")
    if not kept:
        counts = ", ".join(f"{count} {name}" for name, count in dropped.items())
        raise DataError(
            f"{where}: all {num_documents} documents were dropped ({counts}); check prepare.text_key and the rules"
        )
    if not state.documents["valid"]:
        raise DataError(
            f"{where}: none of {kept} documents fell into the validation part; "
            f"raise prepare.valid_share ({config.settings.valid_share}) or add documents"
        )
    if not state.documents["train"]:
        remedy = (
            f"raise prepare.max_bytes ({config.settings.max_bytes})"
            if state.documents["over_max_bytes"]
            else f"lower prepare.valid_share ({config.settings.valid_share}) or add documents"
        )
        raise DataError(f"{where}: none of {kept} documents is left for the training part; {remedy}")

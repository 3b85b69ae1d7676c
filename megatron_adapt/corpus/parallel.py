"""Turn pairs of translated sentences into training and validation documents (Swallow, section 3.3).

Reads: JSON lines with one text per language. Writes: ``train-00000.jsonl.zst``, ``valid-00000.jsonl.zst`` and
``stage.json``. Every pair gives two documents, one per direction, both training or both validation.

- ``plain``: ``{"id", "text"}``, the first text, then the second; the loss counts on both.
- ``instruction``: ``{"id", "prompt", "text"}``, the prompt being the request and the first text, the text the second;
  ``tools/preprocess_data.py`` keeps the prompt out of the loss.

The paper found plain pairs mixed into the corpus, or an instruction stage before it, best for translation, and other
tasks indifferent (Fujii et al. 2024, arXiv:2404.17790).
Costs: about 50,000 pairs a second; 120 bytes for every distinct pair.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

from megatron_adapt.config import ParallelSettings, PrepareParallel
from megatron_adapt.corpus.documents import DocumentWriter, get_text, read_documents
from megatron_adapt.corpus.inputs import find_files
from megatron_adapt.corpus.prepare import TRAIN_FILE, VALID_FILE, is_validation, name_document
from megatron_adapt.errors import DataError
from megatron_adapt.files import STAGE_FILE, replace_folder, write_stage
from megatron_adapt.logs import show_progress

_logger = logging.getLogger(__name__)


def prepare_parallel(config: PrepareParallel) -> None:
    """Write the documents made of the pairs in ``config.input`` to ``config.output``.

    Raises:
        ConfigError: the output exists and ``overwrite`` is off.
        DataError: an input is missing or damaged, a line is no pair, or a part would be empty.
    """
    settings = config.settings
    paths = find_files(config.input, "--input")
    counts: Counter[str] = Counter()
    seen: set[bytes] = set()
    with replace_folder(config.output, overwrite=config.overwrite) as folder:
        with ExitStack() as stack:
            writers = {
                "train": stack.enter_context(DocumentWriter(folder / TRAIN_FILE)),
                "valid": stack.enter_context(DocumentWriter(folder / VALID_FILE)),
            }
            advance = stack.enter_context(show_progress("preparing pairs", None, "pairs"))
            for where, pair in read_documents(paths):
                first, second = (get_text(pair, language, where) for language in settings.languages)
                data = f"{first}\0{second}".encode()
                name = name_document(pair, settings.id_key, data, where)
                reason = _decide(name, first, second, data, seen, settings)
                counts[reason] += 1
                if reason in writers:
                    for document in make_documents(name, first, second, settings):
                        writers[reason].write(document)
                advance()
        for part in writers:
            if not counts[part]:
                raise DataError(
                    f"{', '.join(map(str, config.input))}: none of {counts.total()} pairs is in the {part} part "
                    f"({dict(counts)}); add pairs or change parallel.valid_share ({settings.valid_share})"
                )
        write_stage(folder / STAGE_FILE, config=config, inputs=paths, counts={"pairs": dict(counts)})
    _logger.info("%s: pairs %s", config.output, ", ".join(f"{count:,} {name}" for name, count in counts.items()))


def _decide(name: str, first: str, second: str, data: bytes, seen: set[bytes], settings: ParallelSettings) -> str:
    if not first.strip() or not second.strip():
        return "empty"
    if first.strip() == second.strip():
        return "untranslated"
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    group = name.partition(settings.group_separator)[0] if settings.group_separator else name
    return "valid" if is_validation(group, settings.valid_share) else "train"


def make_documents(name: str, first: str, second: str, settings: ParallelSettings) -> Iterator[dict[str, str]]:
    """Yield the documents of both directions of a pair."""
    languages = settings.languages
    for (source, target), (before, after) in (
        (languages, (first, second)),
        (languages[::-1], (second, first)),
    ):
        direction = f"{source}-{target}"
        if settings.format == "plain":
            yield {"id": f"{name}/{direction}", "text": f"{before}{settings.separator}{after}"}
        else:
            request = settings.instructions[direction]
            prompt = f"{request}{settings.separator}{before}{settings.separator}"
            yield {"id": f"{name}/{direction}", "prompt": prompt, "text": after}

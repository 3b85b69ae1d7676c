"""Read both languages in the shares that a vocabulary for both is to be counted on.

1. ``_measure`` reads both corpora once for their sizes.
2. ``_thin`` takes whole documents, evenly spread, of the one that is too large; always the same ones.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.logs import show_progress

_logger = logging.getLogger(__name__)


def read_mix(config: BuildTokenizer) -> Iterator[str]:
    """Yield texts of ``config.corpus``, then of ``config.old_corpus``; these make up ``old_share`` of the bytes.

    As much text as the shares allow.

    Raises:
        ConfigError: there is no old corpus, and ``old_share`` asks for one.
        DataError: a corpus is damaged or holds no text.
    """
    settings = config.settings
    if settings.old_share and not config.old_corpus:
        raise ConfigError(
            f"--old-corpus: missing; method {settings.method} counts the old language too, name documents in it "
            "(or set tokenizer.old_share to 0)"
        )
    parts = [
        ("--corpus", config.corpus, 1 - settings.old_share),
        ("--old-corpus", config.old_corpus, settings.old_share),
    ]
    parts = [part for part in parts if part[2]]
    sizes = [_measure(flag, paths, config.text_key) for flag, paths, _ in parts]
    total = min(size / share for size, (_, _, share) in zip(sizes, parts, strict=True))
    for size, (flag, paths, share) in zip(sizes, parts, strict=True):
        _logger.info("%s: counting %.1f of %.1f MB of text", flag, total * share / 1e6, size / 1e6)
        yield from _thin(read_texts(paths, config.text_key), total * share / size)


def _measure(flag: str, paths: tuple[Path, ...], text_key: str) -> int:
    total = 0
    with show_progress(f"measuring {flag}", None, "MB") as advance:
        for text in read_texts(paths, text_key):
            size = len(text.encode())
            total += size
            advance(size / 1e6)
    if not total:
        raise DataError(f"{flag}: {', '.join(map(str, paths))} hold no text; check the files")
    return total


def _thin(texts: Iterable[str], share: float) -> Iterator[str]:
    """Yield texts that make up ``share`` of the bytes, at any time as nearly as whole texts can."""
    seen = taken = 0
    for text in texts:
        size = len(text.encode())
        seen += size
        if taken + size / 2 <= share * seen:
            taken += size
            yield text

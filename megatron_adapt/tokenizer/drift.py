"""How far a new tokenizer changes the old language: the share of documents whose old-language tokens change.

Old-language text is all text but the characters of the new language's scripts, where these are named: an English page
that quotes a Japanese title is *touched* when the title gets shorter, and *changed* only if a token of its English
is another one. Tokens are compared as pieces, so that a method that moves ids is judged by how it cuts the text.

Costs: the time of encoding the text twice; at most ``_MAX_BYTES`` of it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import regex
from tokenizers import Encoding

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.corpus.documents import limit_texts, read_texts
from megatron_adapt.errors import DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, piece_bytes

_MAX_BYTES = 100_000_000
_BATCH_TEXTS = 256


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What became of the old language."""

    documents: int
    touched: int
    "Documents with any other token than before."
    changed: int
    "Documents whose old-language text has other tokens than before."
    bytes: int
    base_tokens: int
    tokens: int

    @property
    def share(self) -> float:
        """Share of the documents that changed."""
        return self.changed / self.documents

    @property
    def figures(self) -> dict[str, Any]:
        """The counts with their ratios."""
        return {
            **asdict(self),
            "share": self.share,
            "base_tokens_per_byte": self.base_tokens / self.bytes,
            "tokens_per_byte": self.tokens / self.bytes,
        }


def measure_drift(base: LoadedTokenizer, made: LoadedTokenizer, config: BuildTokenizer) -> Drift | None:
    """Compare two tokenizers on ``config.old_corpus``; None without one.

    Raises:
        DataError: the corpus holds no text, or more documents changed than ``max_drift`` allows.
    """
    if not config.old_corpus:
        return None
    scripts = config.settings.scripts
    new_script = make_filter(scripts).character if scripts else None
    readers = _Reader(base), _Reader(made)
    documents = touched = changed = size = before = after = 0
    first_changed = ""
    texts = limit_texts(read_texts(config.old_corpus, config.text_key), _MAX_BYTES)
    with show_progress("measuring drift", None, "MB") as advance:
        while batch := list(islice(texts, _BATCH_TEXTS)):
            for text, old, new in zip(batch, *(reader.read(batch) for reader in readers), strict=True):
                documents += 1
                size += len(text.encode())
                before, after = before + len(old), after + len(new)
                if old.ids == new.ids or readers[0].spell(old) == readers[1].spell(new):
                    continue
                touched += 1
                if new_script is None or any(
                    left != right for left, right in zip(*(r.read_old(text, new_script) for r in readers), strict=False)
                ):
                    changed += 1
                    first_changed = first_changed or text
            advance(sum(len(text.encode()) for text in batch) / 1e6)
    if not size:
        raise DataError(f"--old-corpus: {', '.join(map(str, config.old_corpus))} hold no text; check the files")
    drift = Drift(documents=documents, touched=touched, changed=changed, bytes=size, base_tokens=before, tokens=after)
    if drift.share > config.settings.max_drift:
        raise DataError(
            f"--old-corpus: the tokens of {changed} of {documents} documents ({drift.share:.2%}) would change, "
            f"the first {first_changed[:60]!r}...; tokenizer.max_drift allows {config.settings.max_drift:.2%}; "
            "name the new language's scripts, or allow more"
        )
    return drift


class _Reader:
    """A tokenizer that gives tokens as the bytes they stand for."""

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self._tokenizer = tokenizer.tokenizer
        self._bytes = piece_bytes(tokenizer)

    def read(self, texts: list[str]) -> list[Encoding]:
        """Return the tokens of texts, without their places."""
        encoded: list[Encoding] = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return encoded

    def spell(self, item: Encoding) -> list[bytes]:
        """Return the bytes of every token."""
        return [self._bytes[index] for index in item.ids]

    def read_old(self, text: str, new_script: regex.Pattern[str]) -> Iterator[tuple[int, bytes] | None]:
        """Yield place and bytes of every token that holds text, none of it in the new scripts; None at the end."""
        item: Encoding = self._tokenizer.encode(text, add_special_tokens=False)
        for index, (start, end) in zip(item.ids, item.offsets, strict=True):
            covered = text[start:end]
            if covered.strip() and not new_script.search(covered):
                yield start, self._bytes[index]
        yield None

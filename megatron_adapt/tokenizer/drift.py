"""How far a new tokenizer changes the old language: the share of documents whose tokens change.

Tokens are compared as pieces, so that a method that moves ids is judged by how it cuts the text.
Costs: the time of encoding the text twice; at most ``_MAX_BYTES`` of it.
"""

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.corpus.documents import limit_texts, read_texts
from megatron_adapt.errors import DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, piece_bytes

_MAX_BYTES = 100_000_000
_BATCH_TEXTS = 256


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What became of the old language."""

    documents: int
    changed: int
    "Documents whose tokens are others than before."
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
    documents = changed = size = before = after = 0
    first_changed = ""
    spelled = piece_bytes(base), piece_bytes(made)
    texts = limit_texts(read_texts(config.old_corpus, config.text_key), _MAX_BYTES)
    with show_progress("measuring drift", None, "MB") as advance:
        while batch := list(islice(texts, _BATCH_TEXTS)):
            encoded = [
                tokenizer.tokenizer.encode_batch_fast(batch, add_special_tokens=False) for tokenizer in (base, made)
            ]
            for text, old, new in zip(batch, *encoded, strict=True):
                documents += 1
                size += len(text.encode())
                before, after = before + len(old), after + len(new)
                if old.ids != new.ids and [spelled[0][i] for i in old.ids] != [spelled[1][i] for i in new.ids]:
                    changed += 1
                    first_changed = first_changed or text
            advance(sum(len(text.encode()) for text in batch) / 1e6)
    if not size:
        raise DataError(f"--old-corpus: {', '.join(map(str, config.old_corpus))} hold no text; check the files")
    drift = Drift(documents=documents, changed=changed, bytes=size, base_tokens=before, tokens=after)
    if drift.share > config.settings.max_drift:
        raise DataError(
            f"--old-corpus: the tokens of {changed} of {documents} documents ({drift.share:.2%}) would change, "
            f"the first {first_changed[:60]!r}...; tokenizer.max_drift allows {config.settings.max_drift:.2%}; "
            "name the new language's scripts, or allow more"
        )
    return drift

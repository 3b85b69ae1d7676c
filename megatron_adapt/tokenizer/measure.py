"""How many tokens a tokenizer spends on a language, and how much of its vocabulary the language uses.

Reads: tokenizer folders and documents. Writes: a table on the terminal and, when asked, JSON
``{tokenizer: {language: figures}}`` with a ``stage.json`` beside it.
Special tokens that a tokenizer adds by itself are not counted. A word is what stands between white space (the
fertility of Rust et al. 2021, arXiv:2012.15613); for scripts without spaces read tokens per character instead.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_adapt.config import MeasureTokenizer
from megatron_adapt.corpus.documents import limit_texts, read_texts
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import STAGE_FILE, require_file, write_json, write_stage
from megatron_adapt.flags import split_pairs
from megatron_adapt.logs import Advance, show_progress
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer

_BATCH_TEXTS = 256
_WIDTH = 120


@dataclass(frozen=True)
class TokenizerFigures:
    """What one tokenizer needs for one language."""

    documents: int
    bytes: int
    characters: int
    words: int
    tokens: int
    tokens_per_word: float
    tokens_per_character: float
    tokens_per_byte: float
    bytes_per_token: float
    single_token_words: float
    "Share of the words that are one token (with the space in front of them)."
    vocabulary_used: float
    "Share of the ids, special tokens aside, that occur."


def measure_tokenizer(config: MeasureTokenizer) -> dict[str, dict[str, TokenizerFigures]]:
    """Measure every tokenizer on every corpus, show a table and write ``config.json``.

    Returns:
        Figures by tokenizer and language.

    Raises:
        ConfigError: a name is given to two tokenizers.
        DataError: a tokenizer or a corpus is missing or damaged, or a corpus is empty.
    """
    folders = split_pairs(config.tokenizers, "--tokenizers")
    for name, paths in folders.items():
        if len(paths) > 1:
            raise ConfigError(f"--tokenizers: {name!r} names {len(paths)} folders; give every tokenizer its own name")
    corpora = split_pairs(config.corpora, "--corpora")
    for path in (path for paths in corpora.values() for path in paths):
        require_file(path, "--corpora")
    tokenizers = {name: read_tokenizer(paths[0]) for name, paths in folders.items()}
    figures: dict[str, dict[str, TokenizerFigures]] = {}
    for name, tokenizer in tokenizers.items():
        figures[name] = {}
        for language, paths in corpora.items():
            texts = limit_texts(read_texts(paths, config.text_key), config.max_bytes)
            with show_progress(f"{name} on {language}", None, "MB") as advance:
                figures[name][language] = measure(tokenizer, _count_up(texts, advance))
            if not figures[name][language].bytes:
                raise DataError(f"--corpora: {language} holds no text ({', '.join(map(str, paths))}); check the files")
    show_table(figures)
    if config.json:
        write_json(
            config.json, {name: {key: asdict(item) for key, item in row.items()} for name, row in figures.items()}
        )
        inputs = [*(paths[0] for paths in folders.values()), *(path for paths in corpora.values() for path in paths)]
        write_stage(config.json.with_name(f"{config.json.stem}.{STAGE_FILE}"), config=config, inputs=inputs)
    return figures


def _count_up(texts: Iterable[str], advance: Advance) -> Iterator[str]:
    for text in texts:
        yield text
        advance(len(text.encode()) / 1e6)


def measure(tokenizer: LoadedTokenizer, texts: Iterable[str]) -> TokenizerFigures:
    """Measure a tokenizer on texts; texts without a word or a token give zeros, not errors."""
    documents = size = characters = tokens = 0
    used = np.zeros(tokenizer.vocab_size, dtype=bool)
    words: Counter[str] = Counter()
    for batch in _take_batches(texts):
        for encoding in tokenizer.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            tokens += len(encoding)
            used[encoding.ids] = True
        for text in batch:
            documents += 1
            size += len(text.encode())
            characters += len(text)
            words.update(text.split())
    special = [index for index, token in tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special]
    used[special] = False
    num_words = words.total()
    return TokenizerFigures(
        documents=documents,
        bytes=size,
        characters=characters,
        words=num_words,
        tokens=tokens,
        tokens_per_word=tokens / max(1, num_words),
        tokens_per_character=tokens / max(1, characters),
        tokens_per_byte=tokens / max(1, size),
        bytes_per_token=size / max(1, tokens),
        single_token_words=_count_single(tokenizer, words) / max(1, num_words),
        vocabulary_used=int(used.sum()) / max(1, tokenizer.vocab_size - len(special)),
    )


def _take_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    reader = iter(texts)
    while batch := list(islice(reader, _BATCH_TEXTS)):
        yield batch


def _count_single(tokenizer: LoadedTokenizer, words: Mapping[str, int]) -> int:
    # SentencePiece puts the space in front by itself.
    before = " " if tokenizer.kind == "byte_level" else ""
    found = 0
    for batch in _take_batches(words):
        encoded = tokenizer.tokenizer.encode_batch_fast([before + word for word in batch], add_special_tokens=False)
        found += sum(words[word] for word, item in zip(batch, encoded, strict=True) if len(item) == 1)
    return found


def show_table(figures: Mapping[str, Mapping[str, TokenizerFigures]]) -> None:
    """Show the figures on standard output, one row for each language and tokenizer."""
    table = Table(title="tokens of text")
    headings = ("tokens/word", "tokens/character", "bytes/token", "single-token words", "vocabulary used")
    for at, heading in enumerate(("language", "tokenizer", "text", *headings)):
        table.add_column(heading, justify="right" if at > 1 else "left")
    languages = {language: None for row in figures.values() for language in row}
    for language in languages:
        for name, row in figures.items():
            item = row[language]
            table.add_row(
                language,
                name,
                f"{item.bytes / 1e6:.2f} MB",
                f"{item.tokens_per_word:.2f}",
                f"{item.tokens_per_character:.3f}",
                f"{item.bytes_per_token:.2f}",
                f"{item.single_token_words:.1%}",
                f"{item.vocabulary_used:.1%}",
            )
        table.add_section()
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)

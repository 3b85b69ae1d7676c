"""Text to ids: by the ``tokenizers`` library, or by ``gigatoken`` where it gives the same.

``tokenizers`` is the reference. ``gigatoken`` is 5 to 12 times as fast and rebuilds the tokenizer from its JSON; that
it gives the same ids is not taken on trust: ``choose_backend`` compares both on texts that are known to be difficult,
on every added token and on a sample of the corpus, and every chunk of a run sends one more text to be compared.
gigatoken knows nothing of the post-processor: what it adds (BOS) is found by ``find_affixes`` and added here. It keeps
every word that it has met, 1.6 MB of memory a megabyte of real text, so it is loaded anew whenever that is too much.

A third backend is one more function in ``_LOADERS``. Source: https://github.com/marcelroed/gigatoken (0.10).
"""

import ctypes
import logging
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import psutil  # type: ignore[import-untyped]
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.pieces import LoadedTokenizer

try:
    import megatron_adapt._csrc as _csrc
except ImportError:
    _csrc = None

Backend = Literal["tokenizers", "gigatoken"]
WantedBackend = Literal["auto", "tokenizers", "gigatoken"]
Affixes = tuple[list[int], list[int]]
"Ids that a tokenizer puts before and behind every text."
Encoder = Callable[[Sequence[str | bytes]], list[NDArray[Any]]]
"""Texts to their ids, special tokens of the tokenizer included: an array a text, of the type asked for or wider.

UTF-8 instead of a string is for gigatoken alone."""

_GROUP_TEXTS = 16
"What the library allocates for so many texts stays in the processor's cache."

_ODD_TEXTS = (
    "", "a", " a", "a ", "  a  b ", "\n", "a\n\n b", "a\r\nb", "\t\ta", " " * 50, "a" * 200, "aA aB",
    "\u00e9 e\u0301 \ufb01 \u2460", "\ufeffa\u200bb\u00adc", "a\u00a0b\u3000c", "\u2581a \u2581", "<0x41>", "\x00a\x00",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3002\u30ab\u30bf\u30ab\u30ca", "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0627\u0644\u0639\u064e\u0631\u064e\u0628\u0650\u064a\u0629", "\u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "\ud55c\uad6d\uc5b4", "\u0e44\u0e17\u0e22", "\U0001f600\U0001f468\u200d\U0001f469", "\U0001d400\U0010ffff\ue000",
    "12345 1,234.5 \u0661\u0662", "don't I'LL we've", "http://a.b/c?d=e&f#g", "x=[1];y={'a':2}//!!", "...!?--__",
)  # fmt: skip
"Where pre-tokenizers and normalizers are known to disagree."

_MAX_CACHE_BYTES = 128 << 20
"Reached by about 80 MB of text, 2 seconds of work; loading takes 0.1 s (32k pieces)."
_logger = logging.getLogger(__name__)


class BackendDiffersError(DataError):
    """gigatoken gave other ids than ``tokenizers`` for a text of the corpus."""


def load_encoder(backend: Backend, tokenizer_json: str, dtype: np.dtype[Any], affixes: Affixes) -> Encoder:
    """Return the function that encodes texts.

    Args:
        backend: the library to use.
        tokenizer_json: content of a ``tokenizer.json``.
        dtype: type of an id that is wide enough.
        affixes: what ``find_affixes`` finds for the tokenizer.

    Raises:
        Exception: the library refuses the tokenizer, in its own words.
    """
    return _LOADERS[backend](tokenizer_json, dtype, affixes)


def _load_tokenizers(tokenizer_json: str, dtype: np.dtype[Any], _: Affixes) -> Encoder:
    tokenizer = Tokenizer.from_str(tokenizer_json)

    def encode(texts: Sequence[str | bytes]) -> list[NDArray[Any]]:
        groups = (texts[at : at + _GROUP_TEXTS] for at in range(0, len(texts), _GROUP_TEXTS))
        return [pack_ids(encoding.ids, dtype) for group in groups for encoding in tokenizer.encode_batch_fast(group)]

    return encode


def pack_ids(ids: list[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a list of ids as an array of a type of ``index.token_dtype``."""
    if _csrc is None:
        return np.fromiter(ids, dtype, len(ids))
    packed: NDArray[Any] = _csrc.pack_ids(ids, dtype.itemsize)
    return packed


def _load_gigatoken(tokenizer_json: str, dtype: np.dtype[Any], affixes: Affixes) -> Encoder:
    head, tail = (np.array(ids, dtype) for ids in affixes)
    bounded = _BoundedGigatoken(tokenizer_json)

    def encode(texts: Sequence[str | bytes]) -> list[NDArray[Any]]:
        bounded.renew_if_large()
        # One call a text: ``encode_batch`` returns an awkward array, whose import takes longer than a million calls.
        arrays = [bounded.encode_one(text) for text in texts]  # of uint32
        if len(head) or len(tail):
            return [np.concatenate([head, ids, tail], dtype=dtype, casting="unsafe") for ids in arrays]
        return arrays

    return encode


class _BoundedGigatoken:
    """A gigatoken tokenizer that is loaded anew when the process has grown by ``_MAX_CACHE_BYTES``."""

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer_json = tokenizer_json
        self._process = psutil.Process()
        self._load()

    def _load(self) -> None:
        self.encode_one = import_module("gigatoken").Tokenizer.from_json(self._tokenizer_json).encode
        self._limit = self._process.memory_info().rss + _MAX_CACHE_BYTES

    def renew_if_large(self) -> None:
        if self._process.memory_info().rss > self._limit:
            del self.encode_one
            _return_memory()
            self._load()


def _return_memory() -> None:
    """Hand freed memory back to the system; glibc would keep it, and every renewal would begin higher."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


_LOADERS: dict[Backend, Callable[[str, np.dtype[Any], Affixes], Encoder]] = {
    "tokenizers": _load_tokenizers,
    "gigatoken": _load_gigatoken,
}


def find_affixes(tokenizer: Tokenizer) -> Affixes:
    """Return the ids that the post-processor puts before and behind a text.

    Raises:
        ValueError: it does something else.
    """
    whole, inner = (tokenizer.encode("a", add_special_tokens=adds).ids for adds in (True, False))
    for at in range(len(whole) - len(inner) + 1):
        if whole[at : at + len(inner)] == inner:
            return whole[:at], whole[at + len(inner) :]
    raise ValueError("its post-processor does more than add tokens before and behind a text")


def expect_backend(wanted: WantedBackend, tokenizer: LoadedTokenizer) -> Backend:
    """Return what ``choose_backend`` returns where both libraries agree, without a comparison."""
    if wanted == "tokenizers" or find_spec("gigatoken") is None:
        return "tokenizers"
    try:
        find_affixes(tokenizer.tokenizer)
    except ValueError:
        return "tokenizers"
    return "gigatoken"


def choose_backend(wanted: WantedBackend, tokenizer: LoadedTokenizer, sample: Iterable[str]) -> Backend:
    """Return the backend to use; ``auto`` takes gigatoken if it is installed and gives the same ids.

    Args:
        wanted: the setting.
        tokenizer: what has to be reproduced.
        sample: texts of the corpus.

    Raises:
        ConfigError: gigatoken is wanted and not installed.
        DataError: gigatoken is wanted and gives other ids.
    """
    if wanted == "tokenizers":
        return "tokenizers"
    if find_spec("gigatoken") is None:
        if wanted == "gigatoken":
            raise ConfigError("--backend: gigatoken is not installed; install it or use --backend tokenizers")
        _logger.info("gigatoken is not installed; with it (pip install gigatoken) this goes 5 to 12 times as fast")
        return "tokenizers"
    problem = _find_problem(tokenizer, sample)
    if problem is None:
        return "gigatoken"
    if wanted == "gigatoken":
        raise DataError(f"{tokenizer.folder}: {problem}; use --backend tokenizers")
    _logger.warning("%s: %s; going on with tokenizers, which is slower", tokenizer.folder, problem)
    return "tokenizers"


def _find_problem(tokenizer: LoadedTokenizer, sample: Iterable[str]) -> str | None:
    added = (token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values())
    texts = [*_ODD_TEXTS, *(f"a {content}b{content} " for content in added), *sample]
    try:
        affixes = find_affixes(tokenizer.tokenizer)
        encode = load_encoder("gigatoken", tokenizer.tokenizer.to_str(), np.dtype(np.int64), affixes)
        found = encode(texts)
    except Exception as error:  # the library raises ValueError for most, not for all
        return f"gigatoken cannot be used with this tokenizer ({error})"
    return compare_ids(tokenizer.tokenizer, texts, found)


def compare_ids(tokenizer: Tokenizer, texts: Sequence[str], found: Sequence[NDArray[Any]]) -> str | None:
    """Say which text has other ids than ``tokenizers`` gives it, and where; None if none has."""
    for text, encoding, ids in zip(texts, tokenizer.encode_batch_fast(texts), found, strict=True):
        if encoding.ids == (other := ids.tolist()):
            continue
        pairs = zip(encoding.ids, other, strict=False)
        at = next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(encoding.ids), len(other)))
        return (
            f"gigatoken gives other ids than tokenizers for {_shorten(text)}: {other[at : at + 4]} instead of "
            f"{encoding.ids[at : at + 4]} at token {at}"
        )
    return None


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")

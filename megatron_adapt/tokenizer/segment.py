"""Word segmentation of text whose language writes no spaces, so that no piece is learned across two words.

Used on the text a tokenizer learns from, never on the text it reads later. Source: Swallow (Fujii et al. 2024,
arXiv:2404.17790), which cuts Japanese by MeCab before it learns pieces.
Guarantee: the words of a text, put together again, are the text.
Costs: ``fugashi`` reads about a megabyte a second on each core.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator

from megatron_adapt.errors import ConfigError, DataError

Segmenter = Callable[[str], Iterable[str]]
_SHOWN = 60


def make_segmenter(name: str) -> Segmenter:
    """Return the function that cuts a text into words.

    Args:
        name: ``fugashi`` (MeCab with UniDic), ``MODULE:FUNCTION`` for a function of that kind, or nothing to leave
            every text whole.

    Returns:
        A function that raises ``DataError`` for a text whose words are not the text.

    Raises:
        ConfigError: there is no such segmenter, or it is not installed.
    """
    if not name:
        return lambda text: (text,)
    cut = _load_fugashi() if name == "fugashi" else _load_function(name)

    def segment(text: str) -> list[str]:
        try:
            words = list(cut(text))
            joined = "".join(words)
        except Exception as error:  # foreign code
            raise DataError(
                f"tokenizer.segmenter: {name} failed on {text[:_SHOWN]!r}... ({type(error).__name__}: {error}); "
                "correct the segmenter or the text"
            ) from None
        if joined != text:
            at = next((at for at, (old, new) in enumerate(zip(text, joined, strict=False)) if old != new), len(joined))
            raise DataError(
                f"tokenizer.segmenter: {name} makes {joined[at : at + _SHOWN]!r} of {text[at : at + _SHOWN]!r}; the "
                "words it returns must be the text, white space included"
            )
        return words

    return segment


def _load_fugashi() -> Segmenter:
    install = "install the extra: pip install 'megatron-adapt[ja]'"
    try:
        import fugashi
    except ImportError:
        raise ConfigError(f"tokenizer.segmenter: fugashi is not installed; {install}") from None
    try:
        tagger = fugashi.Tagger()
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip(" -")), "no reason given")
        raise ConfigError(f"tokenizer.segmenter: fugashi finds no dictionary ({reason}); {install}") from None

    def cut(text: str) -> Iterator[str]:
        for line in text.splitlines(keepends=True):
            # MeCab stops at a null character and drops white space, which here goes with the word behind it.
            readable = line.replace("\0", " ")
            at = 0
            for word in tagger(readable):
                end = readable.index(word.surface, at) + len(word.surface)
                yield line[at:end]
                at = end
            if at < len(line):
                yield line[at:]

    return cut


def _load_function(name: str) -> Segmenter:
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"tokenizer.segmenter: {name!r} is no segmenter; use fugashi or MODULE:FUNCTION")
    try:
        found: Segmenter = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"tokenizer.segmenter: {name!r} cannot be imported ({error}); put its folder on PYTHONPATH"
        ) from None
    return found

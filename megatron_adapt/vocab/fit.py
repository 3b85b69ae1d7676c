"""Whether a tokenizer fits a model, and which rows of the old vocabulary it keeps."""

from collections.abc import Iterator
from pathlib import Path

from megatron_adapt.errors import CheckpointError
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.tokenizer.pieces import LoadedTokenizer


def check_fit(
    model: Path, num_rows: int, own: LoadedTokenizer | None, tokenizer: LoadedTokenizer, id_map: IdMap
) -> None:
    """Refuse a tokenizer that was not made from the one of this model.

    Args:
        model: folder of the model, for messages.
        num_rows: rows of its vocabulary matrices, padding aside.
        own: the tokenizer that travels with it.
        tokenizer: the new tokenizer.
        id_map: which of its ids are which old ones.

    Raises:
        CheckpointError: sizes differ, or a token that should stay is another one.
    """
    base_size = id_map.base_vocab_size
    # Spare rows beyond the model's own tokenizer are common; without that tokenizer they cannot be told from lost ones.
    fits = num_rows == base_size if own is None else own.vocab_size == base_size <= num_rows
    remedy = f"build the tokenizer from this model's: tools/build_tokenizer.py --base {own.folder if own else model}"
    if not fits:
        said = "" if own is None else f" (its tokenizer {own.vocab_size} tokens)"
        raise CheckpointError(
            f"{model}: has {num_rows} vocabulary rows{said}, but {tokenizer.folder} was made from a base of "
            f"{base_size} tokens; {remedy}"
        )
    if own is None or own.kind != tokenizer.kind:
        return
    for index in range(tokenizer.vocab_size):
        old_id = id_map.old_id(index)
        if old_id is None:
            continue
        old, new = own.tokenizer.id_to_token(old_id), tokenizer.tokenizer.id_to_token(index)
        if old != new:
            raise CheckpointError(
                f"{tokenizer.folder}: id {index} is {new!r}, in the model's tokenizer {old!r}; {remedy}"
            )


def list_runs(id_map: IdMap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (new id, old id, count) of kept tokens among the new ids [start, stop) that are neighbours in both."""
    run: tuple[int, int, int] | None = None
    for new in range(start, min(stop, id_map.vocab_size)):
        old = id_map.old_id(new)
        if run and old is not None and (new, old) == (run[0] + run[2], run[1] + run[2]):
            run = (run[0], run[1], run[2] + 1)
            continue
        if run:
            yield run
        run = None if old is None else (new, old, 1)
    if run:
        yield run

"""Whether a tokenizer fits a model, which rows of the old vocabulary it keeps, and which ids its configs name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_adapt.checkpoint.companions import GENERATION_FILE
from megatron_adapt.checkpoint.hf import CONFIG_FILE
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import read_json, write_json
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, piece_bytes


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
    if own is None:
        return
    old_bytes, new_bytes = piece_bytes(own), piece_bytes(tokenizer)
    for index in range(tokenizer.vocab_size):
        old_id = id_map.old_id(index)
        if old_id is None:
            continue
        old, new = own.tokenizer.id_to_token(old_id), tokenizer.tokenizer.id_to_token(index)
        # The byte <0x7E> and the character, or the spellings of two families, are the same token.
        if old != new and not (new_bytes[index] and new_bytes[index] == old_bytes[old_id]):
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


def renumber_companions(folder: Path, id_map: IdMap) -> None:
    """Change the ids that config and generation config name tokens by to those of the same tokens.

    Ids that the base did not have, such as -1 for none, stay.

    Raises:
        CheckpointError: a token named there is gone.
    """
    new_ids: dict[int, int] = {}
    for index in range(id_map.vocab_size):
        old_id = id_map.old_id(index)
        if old_id is not None:
            new_ids.setdefault(old_id, index)

    def renumber(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [renumber(key, item) for item in value]
        if not isinstance(value, int) or not 0 <= value < id_map.base_vocab_size:
            return value
        if value not in new_ids:
            raise CheckpointError(
                f"{name}: {key} {value} is a token that the new tokenizer lacks; correct it in the model's folder"
            )
        return new_ids[value]

    for name in (CONFIG_FILE, GENERATION_FILE):
        if (folder / name).is_file():
            content = read_json(folder / name)
            named = {key: value for key, value in content.items() if key.endswith(("_token_id", "suppress_tokens"))}
            changed = {key: renumber(key, value) for key, value in named.items()}
            if changed != named:
                write_json(folder / name, {**content, **changed})

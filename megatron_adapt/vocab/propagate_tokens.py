"""The vocabulary of an adapted instruct model: the adapted tokenizer, with the tokens that the instruct model added.

The instruct tokenizer must be the base's plus added tokens. A *kept* token is one of its added tokens, special or not:
the instruct model alone knows what it means, so its row comes from there. In the result it has

- the id that the adapted tokenizer gives it, if it knows the token;
- else the id of the reserved token whose place it took in the base's vocabulary, if that was so;
- else the next id behind all others.

Chat template, roles (BOS, EOS, pad) and what stands around a text are the instruct model's; how text is cut, and so all
other ids, are the adapted tokenizer's.

1. ``plan_vocab`` compares the three tokenizers and gives every token its id;
2. ``write_vocab`` writes the files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import write_json
from megatron_adapt.tokenizer.adopt import list_parts
from megatron_adapt.tokenizer.append import write_extended
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.tokenizer.model_proto import Piece, read_model, replace_pieces, write_model
from megatron_adapt.tokenizer.pieces import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    LoadedTokenizer,
    copy_tokenizer,
    read_content,
    read_settings,
    read_tokenizer,
)

# How the adapted tokenizer is loaded and cuts text.
_MACHINERY = ("tokenizer_class", "auto_map", "backend", "legacy", "add_prefix_space", "from_slow", "sp_model_kwargs")
_RESTATED = ("vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True, kw_only=True)
class ResultVocab:
    """Where the row of every token of the result comes from."""

    vocab_size: int
    id_map: IdMap
    "Of the adapted tokenizer, whose ids are those of the result; further ones are appended."
    kept: dict[int, int]
    "Id in the result to id in the instruct model, of its added tokens."
    renamed: dict[str, str]
    "Tokens of the adapted tokenizer that get another name."
    changed: frozenset[int]
    "Old ids that the instruct model uses for another token than the base."

    def map_to_instruct(self) -> IdMap:
        """Return which id of the instruct model each id of the result is."""
        id_map = self.id_map
        olds: dict[int, int | None] = {new: id_map.old_id(new) for new in range(id_map.vocab_size)}
        olds = {new: None if old in self.changed else old for new, old in olds.items()}
        olds.update(self.kept)
        return IdMap(
            base_vocab_size=1 + max([id_map.base_vocab_size - 1, *self.kept.values()]),
            vocab_size=self.vocab_size,
            moved={new: old for new, old in olds.items() if old is not None and old != new},
            pieces={new: [] for new, old in olds.items() if old is None},
        )


def plan_vocab(
    base: LoadedTokenizer, adapted: LoadedTokenizer, instruct: LoadedTokenizer, id_map: IdMap
) -> ResultVocab:
    """Give every added token of the instruct model its id.

    Args:
        base: tokenizer of the base model.
        adapted: the new tokenizer.
        instruct: tokenizer of the instruct model.
        id_map: which old ids the new ones are.

    Raises:
        CheckpointError: the instruct tokenizer is not the base's plus added tokens.
    """
    changed = _find_changed(base, instruct)
    added = instruct.tokenizer.get_added_tokens_decoder()
    names = {token.content for token in added.values()}
    known = adapted.tokenizer.get_vocab(with_added_tokens=True)
    places: dict[int, int] = {}
    for index in range(id_map.vocab_size):
        old = id_map.old_id(index)
        if old in changed and adapted.tokenizer.id_to_token(index) not in names:
            places.setdefault(old, index)
    kept: dict[int, int] = {}
    renamed: dict[str, str] = {}
    vocab_size = adapted.vocab_size
    for index, token in sorted(added.items()):
        if token.content in known:
            new = known[token.content]
        elif index in places:
            new = places[index]
            renamed[str(adapted.tokenizer.id_to_token(new))] = token.content
        else:
            new = vocab_size
            vocab_size += 1
        kept[new] = index
    return ResultVocab(vocab_size=vocab_size, id_map=id_map, kept=kept, renamed=renamed, changed=frozenset(changed))


def _find_changed(base: LoadedTokenizer, instruct: LoadedTokenizer) -> set[int]:
    """Return the ids that are one added token in the base and another in the instruct model; refuse other changes."""
    before, after = (one.tokenizer.get_added_tokens_decoder() for one in (base, instruct))
    changed = set()
    for index in range(max(base.vocab_size, instruct.vocab_size)):
        old, new = base.tokenizer.id_to_token(index), instruct.tokenizer.id_to_token(index)
        if old == new:
            continue
        if index not in after or not (old is None or index in before):
            raise CheckpointError(
                f"{instruct.folder}: id {index} is {new!r}, in the base's tokenizer {base.folder} {old!r}; name an "
                "instruct model that has the tokenizer of its base, with tokens added at most"
            )
        if old is not None:
            changed.add(index)
    return changed


def write_vocab(vocab: ResultVocab, adapted: LoadedTokenizer, instruct: LoadedTokenizer, folder: Path) -> None:
    """Write all tokenizer files of the result into a folder."""
    with TemporaryDirectory() as name:
        scratch = Path(name)
        copy_tokenizer(instruct.folder, scratch)
        for file in (*_RESTATED, MODEL_FILE):
            (scratch / file).unlink(missing_ok=True)
        content = _merge_contents(vocab, adapted, instruct)
        write_json(scratch / JSON_FILE, content)
        if (adapted.folder / MODEL_FILE).is_file():
            model = read_model(adapted.folder / MODEL_FILE)
            pieces = [_rename(piece, vocab.renamed) for piece in model.pieces]
            write_model(replace_pieces(model, pieces), scratch / MODEL_FILE)
        write_json(scratch / CONFIG_FILE, _merge_settings(content["added_tokens"], adapted, instruct))
        if adapted.algorithm == "BPE":
            write_extended(read_tokenizer(scratch), [], folder)
        else:
            copy_tokenizer(scratch, folder)


def _rename(piece: Piece, renamed: Mapping[str, str]) -> Piece:
    return Piece(renamed.get(piece.text, piece.text), piece.score, piece.kind)


def _merge_contents(vocab: ResultVocab, adapted: LoadedTokenizer, instruct: LoadedTokenizer) -> dict[str, Any]:
    """Return the ``tokenizer.json`` of the result."""
    content, theirs = read_content(adapted), read_content(instruct)
    new_ids = {old: new for new, old in vocab.kept.items()}
    tokens = {new_ids[token["id"]]: {**token, "id": new_ids[token["id"]]} for token in theirs["added_tokens"]}
    for token in content["added_tokens"]:
        tokens.setdefault(token["id"], token)
    content["added_tokens"] = [tokens[index] for index in sorted(tokens)]
    if isinstance(content["model"]["vocab"], dict):
        names = content["model"]["vocab"]
        content["model"]["vocab"] = {vocab.renamed.get(name, name): index for name, index in names.items()}
        # Else the library numbers added tokens anew where ids below them are unused.
        content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    parts = [part for part in list_parts(content.get("post_processor")) if part["type"] != "TemplateProcessing"]
    for part in list_parts(theirs.get("post_processor")):
        if part["type"] == "TemplateProcessing":
            for token in part["special_tokens"].values():
                token["ids"] = [ids[text] for text in token["tokens"]]
            parts.append(part)
    content["post_processor"] = {"type": "Sequence", "processors": parts} if len(parts) > 1 else next(iter(parts), None)
    return content


def _merge_settings(
    tokens: list[dict[str, Any]], adapted: LoadedTokenizer, instruct: LoadedTokenizer
) -> dict[str, Any]:
    """Return the ``tokenizer_config.json`` of the result: the instruct model's, loaded as the adapted one is."""
    ours, theirs = (read_settings(one.folder, CONFIG_FILE) for one in (adapted, instruct))
    settings = {key: value for key, value in theirs.items() if key not in _MACHINERY}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {key: ours[key] for key in _MACHINERY if key in ours}
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens
        }
    return settings

"""Write a tokenizer with another vocabulary around the special tokens and settings of its base.

``tokenizer.json`` keeps normaliser, pre-tokenizer, decoder and post-processor, ``tokenizer_config.json`` the roles of
the special tokens, and chat templates stay: only ids differ. Wherever one of these files names an id, it is that of
the same token in the new vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.files import write_json
from megatron_adapt.tokenizer.model_proto import PieceModel, write_model
from megatron_adapt.tokenizer.pieces import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    LoadedTokenizer,
    copy_tokenizer,
    read_content,
    read_settings,
)

ADDED_FILE = "added_tokens.json"
# These restate the vocabulary for readers of single families; tokenizer.json is what counts.
_STALE = ("vocab.json", "merges.txt", MODEL_FILE)
_PLAIN_CLASS = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is
_PLAIN_CONFIG = {"tokenizer_class": _PLAIN_CLASS, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def list_fixed(base: LoadedTokenizer) -> list[str]:
    """List the tokens that every vocabulary made from ``base`` holds, in the order of their ids.

    These are its added tokens, those of its post-processor, BOS, EOS, and what stands for an unknown character.
    """
    tokenizer, content = base.tokenizer, read_content(base)
    ids = {index for index in (base.bos_id, base.eos_id) if index is not None}
    ids |= {*tokenizer.get_added_tokens_decoder(), *tokenizer.encode("").ids}
    unknown = tokenizer.token_to_id(content["model"].get("unk_token") or "<unk>")
    if unknown is not None and base.kind == "sentencepiece":
        ids.add(unknown)
    return [tokenizer.id_to_token(index) or "" for index in sorted(ids)]


def write_renumbered(base: LoadedTokenizer, model: Mapping[str, Any], pieces: PieceModel | None, folder: Path) -> None:
    """Write every tokenizer file of ``base``, with another vocabulary.

    Args:
        base: the tokenizer whose settings are kept.
        model: the part of ``tokenizer.json`` that holds the vocabulary, all of ``list_fixed`` included.
        pieces: the ``tokenizer.model``, for a SentencePiece.
        folder: an existing folder.
    """
    vocab = model["vocab"]
    ids = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    for path in copy_tokenizer(base.folder, folder):
        if path.name in _STALE:
            path.unlink()
    content = read_content(base)
    added = [{**token, "id": ids[token["content"]]} for token in content["added_tokens"]]
    content["added_tokens"] = sorted(added, key=lambda token: token["id"])
    content["post_processor"] = _renumber_processor(content.get("post_processor"), ids)
    content["model"] = dict(model)
    (folder / JSON_FILE).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    if pieces is not None:
        write_model(pieces, folder / MODEL_FILE)
    _write_settings(base, ids, folder, is_plain=model.get("type") == "Unigram")


def _renumber_processor(processor: Any, ids: Mapping[str, int]) -> Any:
    match processor:
        case {"type": "Sequence", "processors": parts}:
            return {**processor, "processors": [_renumber_processor(part, ids) for part in parts]}
        case {"type": "TemplateProcessing", "special_tokens": tokens}:
            renumbered = {
                name: {**token, "ids": [ids[text] for text in token["tokens"]]} for name, token in tokens.items()
            }
            return {**processor, "special_tokens": renumbered}
        case {"type": "BertProcessing" | "RobertaProcessing", "sep": [sep, _], "cls": [cls, _]}:
            return {**processor, "sep": [sep, ids[sep]], "cls": [cls, ids[cls]]}
    return processor


def _write_settings(base: LoadedTokenizer, ids: Mapping[str, int], folder: Path, *, is_plain: bool) -> None:
    settings = read_settings(base.folder, CONFIG_FILE)
    if not settings and not (base.folder / JSON_FILE).is_file():
        settings = {role: text for role, text in _PLAIN_CONFIG.items() if text in (_PLAIN_CLASS, *ids)}
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        tokens = sorted(listed.values(), key=lambda token: ids[token["content"]])
        settings["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in tokens}
    if is_plain:
        # LlamaTokenizer would make a BPE of it.
        settings["tokenizer_class"] = _PLAIN_CLASS
    if settings:
        write_json(folder / CONFIG_FILE, settings)
    if (folder / ADDED_FILE).is_file():
        named = read_settings(base.folder, ADDED_FILE)
        write_json(folder / ADDED_FILE, {text: ids[text] for text in named})

"""``transplant --adopt``: another model's whole tokenizer, with the base's special tokens in their roles.

The model knows its own BOS, EOS and chat turns, and nothing of the donor's: these stay what they were, only their ids
move. Ids of text are the donor's (``id_map`` finds the rows that stand for the same bytes).

1. ``_add_specials`` gives the base's special tokens that the donor lacks ids behind all of the donor's, and takes over
   the tokens that the base puts around a text.
2. ``_describe`` takes over the roles in ``tokenizer_config.json``.
3. ``_choose_template`` keeps the base's template of chats if all added tokens that it names are there; else the
   donor's stays.

The donor's ``tokenizer.json`` and ``tokenizer.model`` are not changed otherwise, so they agree as far as they did.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.errors import DataError
from megatron_adapt.files import write_json
from megatron_adapt.tokenizer.append import write_extended
from megatron_adapt.tokenizer.base import check_base
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.made import Made
from megatron_adapt.tokenizer.pieces import (
    CONFIG_FILE,
    JSON_FILE,
    SPACE,
    LoadedTokenizer,
    copy_tokenizer,
    read_settings,
    read_tokenizer,
)
from megatron_adapt.tokenizer.words import count_words

_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
_ADDS = ("add_bos_token", "add_eos_token")
_OTHER_ROLES_FILE = "special_tokens_map.json"
_TEMPLATE_FILES = ("chat_template.*", "additional_chat_templates/*")
_TEMPLATE_KEY = "chat_template"
_logger = logging.getLogger(__name__)


def adopt_donor(base: LoadedTokenizer, donor: LoadedTokenizer, config: BuildTokenizer, folder: Path) -> Made:
    """Write ``donor`` to ``folder``, with the special tokens of ``base``.

    Raises:
        DataError: the donor's files contradict one another, or it does not give text back as it was.
    """
    check_base(donor)
    words = count_words(donor, read_texts(config.corpus, config.text_key), make_filter(()))
    _require_lossless(donor, words.sample)
    with TemporaryDirectory() as name:
        scratch = Path(name)
        for path in copy_tokenizer(donor.folder, scratch):
            # These restate roles and added tokens.
            if path.name in (_OTHER_ROLES_FILE, "added_tokens.json"):
                path.unlink()
        added = _add_specials(base, donor, scratch)
        _describe(base, added, scratch)
        template = _choose_template(base, read_tokenizer(scratch), scratch)
        write_extended(read_tokenizer(scratch), [], folder)
    names = ", ".join(token["content"] for token in added) or "none"
    _logger.info("adopted %s; special tokens of the base added: %s; chat template: %s", donor.folder, names, template)
    return Made(
        keeps_ids=False,
        is_safe=False,
        num_asked=donor.vocab_size,
        reasons=Counter({"adopted": donor.vocab_size, "special token": len(added)}),
        sample=words.sample,
        num_texts=words.num_texts,
        num_bytes=words.num_bytes,
    )


def _require_lossless(donor: LoadedTokenizer, texts: list[str]) -> None:
    encoded = donor.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    decoded = donor.tokenizer.decode_batch([item.ids for item in encoded], skip_special_tokens=False)
    for text, found in zip(texts, decoded, strict=True):
        if found not in (text, text.replace(SPACE, " ")):
            at = next((at for at, (old, new) in enumerate(zip(text, found, strict=False)) if old != new), 0)
            raise DataError(
                f"--donor: {donor.folder} gives {text[at : at + 30]!r} back as {found[at : at + 30]!r}; a tokenizer "
                "that changes text cannot be adopted, take its pieces instead (without --adopt)"
            )


def _add_specials(base: LoadedTokenizer, donor: LoadedTokenizer, scratch: Path) -> list[dict[str, Any]]:
    """Write ``tokenizer.json`` with the base's special tokens and post-processor; return the tokens added."""
    content = orjson.loads(donor.tokenizer.to_str())
    old = orjson.loads(base.tokenizer.to_str())
    others = [part for part in list_parts(content["post_processor"]) if part["type"] == "ByteLevel"]
    templates = [part for part in list_parts(old["post_processor"]) if part["type"] == "TemplateProcessing"]
    around = {text for part in templates for token in part["special_tokens"].values() for text in token["tokens"]}
    known = {token["content"]: token for token in content["added_tokens"]}
    vocab, next_id = content["model"]["vocab"], donor.vocab_size
    added: list[dict[str, Any]] = []
    for token in old["added_tokens"]:
        text = token["content"]
        if text in known:
            known[text]["special"] |= token["special"]
        elif token["special"] or text in around:
            added.append({**token, "id": vocab.setdefault(text, next_id)})
            next_id += vocab[text] == next_id
    content["added_tokens"] = sorted([*content["added_tokens"], *added], key=lambda token: token["id"])
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    for part in templates:
        for token in part["special_tokens"].values():
            token["ids"] = [ids[text] for text in token["tokens"]]
    parts = [*others, *templates]
    content["post_processor"] = {"type": "Sequence", "processors": parts} if len(parts) > 1 else next(iter(parts), None)
    write_json(scratch / JSON_FILE, content)
    return added


def list_parts(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the parts of a post-processor of ``tokenizer.json``, those of sequences one by one."""
    if processor and processor["type"] == "Sequence":
        yield from chain.from_iterable(map(list_parts, processor["processors"]))
    elif processor:
        yield processor


def _describe(base: LoadedTokenizer, added: list[dict[str, Any]], scratch: Path) -> None:
    """Write ``tokenizer_config.json``: the donor's, with the roles of the base's special tokens."""
    named = [read_settings(base.folder, name) for name in (_OTHER_ROLES_FILE, CONFIG_FILE)]
    roles = {role: settings[role] for settings in named for role in _ROLES if settings.get(role) is not None}
    for role, index in (("bos_token", base.bos_id), ("eos_token", base.eos_id)):
        if index is not None:
            roles.setdefault(role, base.tokenizer.id_to_token(index))
    settings = read_settings(scratch, CONFIG_FILE)
    for key in _ADDS:
        settings.pop(key, None)
    settings |= roles | {key: named[1][key] for key in _ADDS if key in named[1]}
    if "added_tokens_decoder" in settings:
        listed = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}
        settings["added_tokens_decoder"] |= listed
    write_json(scratch / CONFIG_FILE, {"tokenizer_class": "PreTrainedTokenizerFast", **settings})


def _choose_template(base: LoadedTokenizer, made: LoadedTokenizer, scratch: Path) -> str:
    """Put the base's template of chats in the place of the donor's if the tokens it names are there; say which."""
    files = [path for pattern in _TEMPLATE_FILES for path in sorted(base.folder.glob(pattern))]
    in_settings = read_settings(base.folder, CONFIG_FILE).get(_TEMPLATE_KEY)
    text = "".join(path.read_text(encoding="utf-8") for path in files) + str(in_settings or "")
    if not text:
        return "the donor's, if it has one; the base has none"
    known = {token.content for token in made.tokenizer.get_added_tokens_decoder().values()}
    named = {token.content for token in base.tokenizer.get_added_tokens_decoder().values() if token.content in text}
    if named - known:
        return f"the donor's; the base's names tokens that it lacks: {', '.join(sorted(named - known))}"
    settings = read_settings(scratch, CONFIG_FILE)
    settings.pop(_TEMPLATE_KEY, None)
    write_json(scratch / CONFIG_FILE, settings | ({_TEMPLATE_KEY: in_settings} if in_settings else {}))
    for path in [path for pattern in _TEMPLATE_FILES for path in scratch.glob(pattern)]:
        path.unlink()
    for path in files:
        target = scratch / path.relative_to(base.folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return "the base's"

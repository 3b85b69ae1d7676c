"""Read a tokenizer folder and tell which bytes each piece stands for.

Two families are known, each with a spelling of its own:

- ``byte_level``: BPE over UTF-8 bytes behind a pre-tokenizer (GPT-2, Llama 3, Qwen). A piece is written in
  256 *letters*, one per byte (``to_letters``, ``from_letters``).
- ``sentencepiece``: BPE (Llama 2, Mistral) or Unigram over characters with byte fallback. A space is written U+2581,
  a character without a piece of its own becomes ``<0xAB>`` byte pieces.

Everything else (WordPiece, BPE or Unigram without bytes to fall back on) is refused by name. A Unigram has no merges
to build on: it is read and measured, but is no base (``require_bpe``).
Reads: ``tokenizer.json``, or a ``tokenizer.model`` alone, and the special tokens of ``tokenizer_config.json``.
"""

import hashlib
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import orjson
from tokenizers import Tokenizer

from megatron_adapt.errors import DataError
from megatron_adapt.files import read_json
from megatron_adapt.tokenizer.model_proto import Algorithm, convert_model, read_model

Kind = Literal["byte_level", "sentencepiece"]
JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPACE = "\u2581"  # how SentencePiece writes a space
_FILE_PATTERNS = (
    JSON_FILE,
    MODEL_FILE,
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "vocab.json",
    "merges.txt",
)
_MAX_HOLES = 1 << 16  # ids without a piece
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with what the other stages ask about it."""

    folder: Path
    tokenizer: Tokenizer
    kind: Kind
    algorithm: Algorithm
    vocab_size: int
    "Highest id + 1, added tokens included."
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    fingerprint: str
    "Hash of ids, pieces, added tokens and merges or scores."


def read_tokenizer(folder: Path) -> LoadedTokenizer:
    """Read a Hugging Face tokenizer folder.

    Truncation and padding that a ``tokenizer.json`` may carry are switched off.

    Raises:
        DataError: there is no tokenizer, it is damaged, or it is of a family this package does not know.
    """
    if (folder / JSON_FILE).is_file():
        tokenizer = _parse_json(folder / JSON_FILE)
    elif (folder / MODEL_FILE).is_file():
        tokenizer = convert_model(read_model(folder / MODEL_FILE), adds_bos=_wants_bos(folder))
    else:
        found = ", ".join(sorted(item.name for item in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise DataError(
            f"{folder}: holds no {JSON_FILE} and no {MODEL_FILE} ({found}); name a tokenizer folder, one that "
            "transformers saved"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) != len(ids):
        raise DataError(f"{folder}: {len(ids) - len(set(ids.values()))} ids stand for several pieces; fix the file")
    content = orjson.loads(tokenizer.to_str())
    bos_id, eos_id = (_find_special(folder, tokenizer, name) for name in ("bos", "eos"))
    return LoadedTokenizer(
        folder=folder,
        tokenizer=tokenizer,
        kind=_find_kind(content, folder),
        algorithm=_find_algorithm(content["model"]),
        vocab_size=max(ids.values(), default=-1) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=bos_id is not None and tokenizer.encode("").ids[:1] == [bos_id],
        fingerprint=_hash_content(content),
    )


def read_content(tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """Read the ``tokenizer.json`` of a folder as written, or as made from a ``tokenizer.model`` that stands alone."""
    path = tokenizer.folder / JSON_FILE
    content: dict[str, Any] = read_json(path) if path.is_file() else orjson.loads(tokenizer.tokenizer.to_str())
    content.setdefault("added_tokens", [])
    return content


def _parse_json(path: Path) -> Tokenizer:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(f"{path}: no 'model' in it; this is not the tokenizer.json of the tokenizers library")
    _find_kind(content, path)
    _check_highest_id(content["model"].get("vocab"), path)
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: the tokenizers library refuses it ({error}); fetch the file again") from None


def _check_highest_id(vocab: Any, path: Path) -> None:
    # A list as long as the highest id is made of it.
    ids = [index for index in vocab.values() if isinstance(index, int)] if isinstance(vocab, dict) else []
    if ids and max(ids) > _MAX_HOLES + 2 * len(ids):
        raise DataError(
            f"{path}: id {max(ids)} in a vocabulary of {len(ids)} pieces; the file is damaged, fetch it again"
        )


def _find_kind(content: dict[str, Any], where: Path) -> Kind:
    model = content["model"]
    name = _find_algorithm(model)
    wanted = "use a byte-level BPE (Llama 3, Qwen) or a SentencePiece BPE with byte fallback (Llama 2, Mistral)"
    if name == "Unigram" and model.get("byte_fallback"):
        return "sentencepiece"
    if name != "BPE":
        lacking = " without byte fallback" if name == "Unigram" else ""
        raise DataError(f"{where}: a {name} tokenizer{lacking} is not supported; {wanted}")
    for setting in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(setting):
            raise DataError(f"{where}: a BPE with {setting} {model[setting]!r} is not supported; {wanted}")
    if _mentions(content.get("pre_tokenizer"), "ByteLevel"):
        return "byte_level"
    if model.get("byte_fallback"):
        return "sentencepiece"
    raise DataError(f"{where}: a BPE with neither a byte-level pre-tokenizer nor byte fallback; {wanted}")


def _find_algorithm(model: dict[str, Any]) -> Any:
    # Old files leave the type out.
    return model.get("type") or ("BPE" if "merges" in model else "Unigram" if "unk_id" in model else "unknown")


def require_bpe(tokenizer: LoadedTokenizer) -> None:
    """Refuse a tokenizer without merges.

    Raises:
        DataError: naming what it is.
    """
    if tokenizer.algorithm != "BPE":
        raise DataError(
            f"{tokenizer.folder}: a SentencePiece {tokenizer.algorithm} has no merges to build on; it can be measured, "
            "trained with and evaluated, but to make another tokenizer of it use a BPE"
        )


def _mentions(value: Any, kind: str) -> bool:
    if isinstance(value, dict):
        return value.get("type") == kind or any(_mentions(item, kind) for item in value.values())
    return isinstance(value, list) and any(_mentions(item, kind) for item in value)


def _wants_bos(folder: Path) -> bool:
    # LlamaTokenizer adds it unless told otherwise.
    return bool(read_settings(folder, CONFIG_FILE).get("add_bos_token", True))


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Read a settings file of a tokenizer folder; nothing where there is none.

    Raises:
        DataError: it is no JSON object.
    """
    settings = read_json(folder / name) if (folder / name).is_file() else {}
    if not isinstance(settings, dict):
        raise DataError(f"{folder / name}: a JSON {type(settings).__name__}, not an object; fetch the file again")
    return settings


def _find_special(folder: Path, tokenizer: Tokenizer, name: Literal["bos", "eos"]) -> int | None:
    for file in (CONFIG_FILE, "special_tokens_map.json"):
        token = read_settings(folder, file).get(f"{name}_token")
        if token is not None:
            content = token.get("content") if isinstance(token, dict) else token
            if not isinstance(content, str):
                raise DataError(f"{folder / file}: {name}_token is {token!r}, not a token; correct it")
            found: int | None = tokenizer.token_to_id(content)
            if found is None:
                raise DataError(f"{folder / file}: {name}_token {content!r} is not in the vocabulary; correct it")
            return found
    usual = tokenizer.token_to_id({"bos": "<s>", "eos": "</s>"}[name])
    return usual if usual in tokenizer.get_added_tokens_decoder() else None


def _hash_content(content: dict[str, Any]) -> str:
    model = content["model"]
    added = [(token["id"], token["content"], token["special"]) for token in content["added_tokens"]]
    if _find_algorithm(model) == "Unigram":
        parts = [model["vocab"], added]
    else:
        pieces = sorted((index, piece) for piece, index in model["vocab"].items())
        parts = [pieces, added, split_merges(model["merges"])]
    return hashlib.blake2b(orjson.dumps(parts), digest_size=16).hexdigest()


def split_merges(merges: list[Any]) -> list[tuple[str, str]]:
    """Read the merges of a ``tokenizer.json``, written as ``"a b"`` or as ``["a", "b"]``."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def encode_texts(tokenizer: LoadedTokenizer, texts: list[str]) -> list[list[int]]:
    """Encode texts with the special tokens the tokenizer adds by itself (BOS, where its post-processor does)."""
    return [encoding.ids for encoding in tokenizer.tokenizer.encode_batch_fast(texts)]


def piece_bytes(tokenizer: LoadedTokenizer) -> list[bytes]:
    """Return the UTF-8 bytes that each id stands for, by id.

    Special tokens and unused ids stand for ``b""``; a SentencePiece U+2581 for one space; a byte piece for its byte.
    """
    found = [b""] * tokenizer.vocab_size
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    for piece, index in tokenizer.tokenizer.get_vocab(with_added_tokens=True).items():
        if index in added:
            found[index] = b"" if added[index].special else piece.encode()
        elif tokenizer.kind == "byte_level":
            found[index] = from_letters(piece)
        else:
            byte = _BYTE_PIECE.fullmatch(piece)
            found[index] = bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()
    return found


def to_byte_piece(byte: int) -> str:
    """Return how SentencePiece writes the piece of a single byte."""
    return f"<0x{byte:02X}>"


def list_byte_pieces(tokenizer: LoadedTokenizer) -> frozenset[str]:
    """Return the pieces that SentencePiece writes single bytes by; a byte-level tokenizer has none."""
    return frozenset(map(to_byte_piece, range(256))) if tokenizer.kind == "sentencepiece" else frozenset()


@cache
def byte_letters() -> dict[int, str]:
    """Return the letter of every byte: itself where it prints, else one from U+0100 on (as GPT-2 does)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)}


@cache
def _letter_table() -> dict[int, str]:
    table = {ord(letter): chr(byte) for byte, letter in byte_letters().items()}
    return {code: table.get(code, "\uffff") for code in {*table, *range(256)}}


def to_letters(data: bytes) -> str:
    """Write bytes in the letters of byte-level BPE; ``from_letters`` is the inverse."""
    letters = byte_letters()
    return "".join(letters[byte] for byte in data)


def from_letters(piece: str) -> bytes:
    """Read a piece written in the letters of byte-level BPE; a piece with any other character stands for itself."""
    try:
        return piece.translate(_letter_table()).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copy every tokenizer file of a Hugging Face folder, chat templates included.

    Returns:
        The files written.

    Raises:
        DataError: the folder holds no tokenizer.
    """
    names = [item.relative_to(source) for pattern in _FILE_PATTERNS for item in sorted(source.glob(pattern))]
    if not {Path(JSON_FILE), Path(MODEL_FILE)} & set(names):
        raise DataError(f"{source}: holds no {JSON_FILE} and no {MODEL_FILE}; name a tokenizer folder")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return [target / name for name in names]

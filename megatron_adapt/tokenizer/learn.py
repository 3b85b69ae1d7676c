"""Learn a tokenizer from nothing: the base of demos, tests and comparisons.

``byte_level`` is made like that of Llama 3 (split expression, byte alphabet, ``<|begin_of_text|>`` in front),
``sentencepiece`` like that of Llama 2 (byte fallback, digits apart, ``<s>`` in front); both come with BOS in their
post-processor and load with ``transformers.AutoTokenizer``. For ``sentencepiece`` the ``tokenizer.json`` is made
from the ``tokenizer.model`` and gives the same ids for every text.
Costs: about 10 s for 8,000 pieces on 10 MB.
"""

import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_adapt.errors import DataError
from megatron_adapt.files import write_json
from megatron_adapt.tokenizer.model_proto import PieceModel, convert_model, read_model
from megatron_adapt.tokenizer.pieces import CONFIG_FILE, JSON_FILE, MODEL_FILE, Kind

# Llama 3 release, llama/tokenizer.py.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>")
_NUM_META = 256 + 3  # bytes, <unk>, <s> and </s> of a SentencePiece model
_MIN_FREQUENCY = 2
_MAX_LINE_BYTES = 1 << 14  # the trainer leaves out longer lines
_logger = logging.getLogger(__name__)


def learn_base_tokenizer(texts: Iterable[str], vocab_size: int, kind: Kind, output: Path) -> None:
    """Learn a tokenizer of ``vocab_size`` pieces and write it as a Hugging Face folder.

    Args:
        texts: documents to learn from.
        vocab_size: number of ids, special tokens and bytes included.
        kind: family of the tokenizer.
        output: folder to write into; other files in it are left alone.

    Raises:
        DataError: the texts are empty or do not give that many pieces.
    """
    output.mkdir(parents=True, exist_ok=True)
    filled = (text for text in texts if text.strip())
    first = next(filled, None)
    if first is None:
        raise DataError("corpus: no text to learn a tokenizer from; check the files and the text key")
    learn = _learn_byte_level if kind == "byte_level" else _learn_sentencepiece
    tokenizer, bos, eos = learn(chain([first], filled), vocab_size, output)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(_too_few(vocab_size, f"{tokenizer.get_vocab_size()} can"))
    tokenizer.save(str(output / JSON_FILE))
    described = {
        # The class that takes tokenizer.json as it is; LlamaTokenizer would put its own pre-tokenizer in.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(output / CONFIG_FILE, described if kind == "byte_level" else {**described, "unk_token": "<unk>"})
    _logger.info("%s: learned a %s tokenizer of %s pieces", output, kind, f"{vocab_size:,}")


def _too_few(vocab_size: int, found: str) -> str:
    return f"vocab_size: {vocab_size} pieces cannot be learned from this text ({found}); lower it or add text"


def _learn_byte_level(texts: Iterator[str], vocab_size: int, output: Path) -> tuple[Tokenizer, str, str]:
    bos, eos = _BYTE_LEVEL_SPECIALS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in (bos, eos)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    first = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, first)]
    )
    return tokenizer, bos, eos


def _learn_sentencepiece(texts: Iterator[str], vocab_size: int, output: Path) -> tuple[Tokenizer, str, str]:
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    (output / MODEL_FILE).write_bytes(train_sentencepiece(lines, vocab_size))
    return convert_model(read_model(output / MODEL_FILE), adds_bos=True), "<s>", "</s>"


def train_sentencepiece(lines: Iterable[str], vocab_size: int, **changes: Any) -> bytes:
    """Train a SentencePiece model with the settings that Llama 2's ``tokenizer.model`` was trained with.

    Args:
        lines: what to learn from.
        vocab_size: number of ids.
        changes: other settings of the trainer, by its own names.

    Returns:
        The content of the ``tokenizer.model``.

    Raises:
        DataError: the lines do not give that many pieces.
    """
    written = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.99995,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "max_sentence_length": _MAX_LINE_BYTES,
        "minloglevel": 2,
        **changes,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, vocab_size=vocab_size, **settings
        )
    except (RuntimeError, OSError) as error:
        raise DataError(_too_few(vocab_size, str(error).rpartition("] ")[2] or str(error))) from None
    return written.getvalue()


def train_on_words(counts: Mapping[str, int], num_pieces: int, **changes: Any) -> PieceModel:
    """Train a SentencePiece model on words with their frequency, spelled with their own U+2581.

    Args:
        counts: words with their frequency.
        num_pieces: pieces beside bytes and special tokens; the words may give fewer.
        changes: other settings of the trainer, by its own names.

    Raises:
        DataError: the trainer refuses its settings.
    """
    content = train_sentencepiece(
        (f"{word}\t{count}" for word, count in counts.items()),
        num_pieces + _NUM_META,
        input_format="tsv",
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        **changes,
    )
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / MODEL_FILE
        path.write_bytes(content)
        return read_model(path)

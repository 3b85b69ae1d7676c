"""Bits per byte of Hugging Face folders, per language: a loss that survives a change of tokenizer.

Reads: HF folders (model and tokenizer), documents. Writes: a JSON file
``{"NAME": {"LANG": {"bits_per_byte": ..., "tokens": ..., ...}}}`` with its record beside it, and a table on the
terminal.

Guarantees: every model scores the same documents, whole ones; every byte of a document is scored once and
divides once; batch size and padding do not change the result. The length of the windows does, slightly: the
first token of a later window sees one token of context.

Method, for every model and language:

1. ``prepend_context``: a document's first token is conditioned on BOS, or on EOS as the separator of documents;
   that token itself is not scored;
2. ``cut_windows``: the ids in windows of ``seq_length`` predictions with one id of overlap;
3. ``sum_nats``: windows of similar length in one forward pass, padded on the right, where a causal model never
   looks; log-softmax in fp32 over slices of the positions;
4. ``Score``: sum of -log2 p over all tokens / UTF-8 bytes of all texts.

Cost: one forward pass over the text; beyond the model, logits and their log-softmax of at most 0.75 GiB.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite, log
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from megatron_adapt.checkpoint.hf import read_hf_shape
from megatron_adapt.config import Evaluate, EvaluateSettings
from megatron_adapt.corpus.documents import limit_texts, read_texts
from megatron_adapt.errors import CheckpointError, ConfigError, DataError
from megatron_adapt.evaluate.report import Evaluation, show_table
from megatron_adapt.files import STAGE_FILE, require_file, write_json, write_stage
from megatron_adapt.flags import split_pairs
from megatron_adapt.logs import Advance, show_progress
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, encode_texts, read_tokenizer

_logger = logging.getLogger(__name__)

_GROUP_DOCUMENTS = 256
_LOGITS_BYTES = 1 << 28
_NOT_SCORED = -100


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a model predicts the texts of one language."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def bits_per_byte(self) -> float:
        """Sum of -log2 p of all tokens, divided by the UTF-8 bytes of all texts."""
        return self.nats / log(2) / self.bytes

    def to_dict(self) -> dict[str, float]:
        """Return the figures that are written; the loss per token is in nats."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "loss_per_token": self.nats / self.tokens,
            "tokens_per_byte": self.tokens / self.bytes,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }


def evaluate(config: Evaluate) -> Evaluation:
    """Score every model on every language, show the table and write it to ``config.json``.

    Returns:
        ``{model: {language: {"bits_per_byte": ..., ...}}}``, in the order of the flags.

    Raises:
        ConfigError: a name is malformed or given twice, or ``seq_length`` exceeds the positions of a model.
        DataError: a corpus is missing, damaged or empty, or a tokenizer has neither BOS nor EOS.
        CheckpointError: a model is incomplete, smaller than its tokenizer, or gives no finite loss.
    """
    folders = _read_models(config.models)
    corpora = split_pairs(config.corpora, "--corpora")
    for path in (path for paths in corpora.values() for path in paths):
        require_file(path, "--corpora")
    evaluation: Evaluation = {}
    for name, folder in folders.items():
        tokenizer = read_tokenizer(folder)
        model = load_model(folder, tokenizer, config.settings.seq_length)
        evaluation[name] = {}
        for language, paths in corpora.items():
            texts = _sample_texts(paths, config.text_key, config.settings.max_bytes)
            with show_progress(f"scoring {name} on {language}", None, "bytes") as advance:
                score = score_texts(model, tokenizer, texts, config.settings, advance)
            evaluation[name][language] = _check_score(score, name, language, paths).to_dict()
    show_table(evaluation)
    if config.json is not None:
        write_json(config.json, evaluation)
        inputs = [*folders.values(), *(path for paths in corpora.values() for path in paths)]
        write_stage(config.json.with_name(f"{config.json.stem}.{STAGE_FILE}"), config=config, inputs=inputs)
    return evaluation


def _read_models(pairs: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for name, paths in split_pairs(pairs, "--models").items():
        if len(paths) > 1:
            raise ConfigError(f"--models: {name!r} names {len(paths)} folders; give every model a name of its own")
        folders[name] = paths[0]
    return folders


def _sample_texts(paths: Sequence[Path], text_key: str, max_bytes: int) -> Iterator[str]:
    """Yield whole texts up to ``max_bytes``, an equal part from each file: the first alone would stand for all."""
    for path in paths:
        yield from limit_texts(read_texts([path], text_key), -(-max_bytes // len(paths)))


def _check_score(score: Score, name: str, language: str, paths: Sequence[Path]) -> Score:
    if not score.tokens:
        files = ", ".join(map(str, paths))
        raise DataError(f"{files}: no text to score for {language!r}; give files with documents that are not empty")
    if not isfinite(score.nats):
        raise CheckpointError(
            f"{name}: the loss on {language!r} is {score.nats}; the weights are damaged or training diverged, "
            "use an earlier checkpoint"
        )
    return score


# ---------------------------------------------------------------- the model


def load_model(folder: Path, tokenizer: LoadedTokenizer, seq_length: int) -> Any:
    """Load a causal language model in its stored type, on the GPU if there is one, ready to score.

    Raises:
        ConfigError: it is no Llama-family model, or has fewer positions than ``seq_length``.
        CheckpointError: weights are missing or unreadable, or the tokenizer has ids without a row.
    """
    shape = read_hf_shape(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{folder}: the model has {shape.vocab_size} rows, its tokenizer {tokenizer.vocab_size} ids; "
            "give it the rows with tools/resize_vocab.py"
        )
    if seq_length > shape.max_position_embeddings:
        raise ConfigError(
            f"evaluate.seq_length: {seq_length} exceeds the {shape.max_position_embeddings} positions of {folder}; "
            f"use at most {shape.max_position_embeddings}"
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: the model cannot be loaded ({reason}); write the folder again") from None
    # transformers gives a missing tensor random values and only warns.
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing, first {missing[0]}; write the folder again"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- scoring


def score_texts(
    model: Any, tokenizer: LoadedTokenizer, texts: Iterable[str], settings: EvaluateSettings, advance: Advance
) -> Score:
    """Score texts in bits per byte; empty texts do not count.

    Args:
        model: a transformers causal language model with ``base_model`` and output embeddings.
        tokenizer: the model's tokenizer.
        texts: the documents.
        settings: lengths and batch size.
        advance: is told the bytes of every group of documents that is done.

    Raises:
        DataError: the tokenizer has neither BOS nor EOS.
    """
    nats, num_tokens, num_bytes, num_documents = 0.0, 0, 0, 0
    for group in _group(text for text in texts if text):
        documents = [prepend_context(ids, tokenizer) for ids in encode_texts(tokenizer, group)]
        windows = [window for ids in documents for window in cut_windows(ids, settings.seq_length)]
        windows.sort(key=len, reverse=True)
        for start in range(0, len(windows), settings.batch_size):
            nats += sum_nats(model, windows[start : start + settings.batch_size])
        group_bytes = sum(len(text.encode()) for text in group)
        num_tokens += sum(len(window) - 1 for window in windows)
        num_bytes += group_bytes
        num_documents += len(group)
        advance(group_bytes)
    return Score(nats=nats, tokens=num_tokens, bytes=num_bytes, documents=num_documents)


def _group(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while group := list(islice(iterator, _GROUP_DOCUMENTS)):
        yield group


def prepend_context(ids: list[int], tokenizer: LoadedTokenizer) -> list[int]:
    """Return the ids of a document with the token before its first one: BOS, or EOS as separator.

    Raises:
        DataError: the tokenizer has neither.
    """
    if tokenizer.adds_bos:
        return ids
    if tokenizer.eos_id is None:
        raise DataError(f"{tokenizer.folder}: neither adds a BOS token nor has an EOS token; name an eos_token")
    return [tokenizer.eos_id, *ids]


def cut_windows(ids: list[int], seq_length: int) -> list[list[int]]:
    """Cut a document into windows of ``seq_length + 1`` ids (the last one shorter) that overlap by one id.

    A window of n ids makes n - 1 predictions, so every id but the document's first is predicted once.
    """
    return [ids[start : start + seq_length + 1] for start in range(0, len(ids) - 1, seq_length)]


def sum_nats(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """Return the sum of -ln p over all predictions of the windows, from one forward pass.

    Padding stands on the right, where a causal model never looks, so no attention mask is needed.
    """
    longest = max(map(len, windows)) - 1
    inputs_BT = torch.zeros(len(windows), longest, dtype=torch.int64)
    targets_BT = torch.full((len(windows), longest), _NOT_SCORED)
    for row, window in enumerate(windows):
        ids = torch.tensor(window)
        inputs_BT[row, : len(ids) - 1] = ids[:-1]
        targets_BT[row, : len(ids) - 1] = ids[1:]
    targets_BT = targets_BT.to(model.device)
    with torch.inference_mode():
        hidden_BTH = model.base_model(input_ids=inputs_BT.to(model.device), use_cache=False).last_hidden_state
        scored_BT = targets_BT != _NOT_SCORED
        return _sum_head_nats(model.get_output_embeddings(), hidden_BTH[scored_BT], targets_BT[scored_BT])


def _sum_head_nats(head: torch.nn.Linear, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> float:
    """Apply the output head to slices of the positions and sum their losses in fp64."""
    step = max(1, _LOGITS_BYTES // (4 * head.weight.shape[0]))
    total = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
    for start in range(0, len(targets_N), step):
        logits_nV = head(hidden_NH[start : start + step]).float()
        losses_n = torch.nn.functional.cross_entropy(logits_nV, targets_N[start : start + step], reduction="none")
        total += losses_n.double().sum()
    return float(total)

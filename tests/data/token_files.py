"""Token files of known ids, with their record, as preprocess_data leaves them."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_adapt.data.index import token_dtype, write_tokens
from megatron_adapt.data.record import TokensRecord, record_path
from megatron_adapt.files import write_json


def make_tokens(
    prefix: Path,
    documents: list[np.ndarray],
    *,
    vocab_size: int = 1000,
    tokenizer: str = "one",
    append_eod: bool = False,
) -> Path:
    lengths = np.array([len(document) for document in documents], np.int32)
    ids = np.concatenate([*documents, np.empty(0, np.int64)])
    with write_tokens(prefix, vocab_size) as writer:
        writer.add_documents(ids.astype(token_dtype(vocab_size)), lengths)
    record = TokensRecord(
        documents=len(documents), skipped_documents=0, tokens=len(ids), bytes=3 * len(ids),
        tokenizer_fingerprint=tokenizer, vocab_size=vocab_size, eod_id=0,
    )  # fmt: skip
    asked = {"settings": {"append_eod": append_eod}}
    write_json(record_path(prefix), {"config": asked, "counts": asdict(record)})
    return prefix


def count_up(first: int, num_tokens: int, document_tokens: int = 7) -> list[np.ndarray]:
    """Documents whose ids count up from ``first``, so that an id tells its place."""
    ids = np.arange(first, first + num_tokens)
    return [ids[start : start + document_tokens] for start in range(0, num_tokens, document_tokens)]

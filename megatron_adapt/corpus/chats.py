"""Read prompts: the beginnings of chats that a model is to answer.

Reads: documents with the key ``messages`` (a chat of roles and contents) or ``prompt`` (a text, the chat of one user's
message). Guarantees: order and number of the documents; every chat has a name, its ``id`` or a hash of its content.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.corpus.documents import get_text, read_documents
from megatron_adapt.corpus.prepare import name_document
from megatron_adapt.errors import DataError

Message = dict[str, str]


@dataclass(frozen=True)
class Chat:
    """A chat that ends before the answer."""

    name: str
    messages: tuple[Message, ...]
    where: str
    "``file:line`` it stands at."


def read_chats(paths: Sequence[Path]) -> Iterator[Chat]:
    """Yield the chat of every document.

    Raises:
        DataError: a file is missing or damaged, or a document holds no chat that can be answered.
    """
    for where, document in read_documents(paths):
        messages = tuple(_read_messages(document, where))
        yield Chat(name_document(document, "id", orjson.dumps(messages), where), messages, where)


def _read_messages(document: dict[str, Any], where: str) -> Iterator[Message]:
    if "messages" not in document:
        yield {"role": "user", "content": get_text(document, "prompt", where)}
        return
    messages = document["messages"]
    for at, message in enumerate(messages if isinstance(messages, list) else [None]):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(
                f'{where}: message {at} of \'messages\' is not of the form {{"role": TEXT, "content": TEXT}}; correct '
                "the line"
            )
        yield {key: message[key] for key in ("role", "content")}
    if not messages or messages[-1]["role"] == "assistant":
        said = "is empty" if not messages else "ends with an answer"
        raise DataError(f"{where}: 'messages' {said}; end it with what is to be answered")

import orjson
import pytest

from megatron_adapt.corpus.chats import read_chats
from megatron_adapt.errors import DataError


def read(path, *rows):
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    return list(read_chats([path]))


def test_a_prompt_is_the_chat_of_one_message(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    first, second, third = read(
        tmp_path / "a.jsonl",
        {"prompt": "p", "id": 7},
        {"messages": [{**chat[0], "name": "x"}, chat[1]]},
        {"prompt": "p"},
    )
    assert (first.name, first.messages) == ("7", ({"role": "user", "content": "p"},))
    assert second.messages == tuple(chat)
    assert third.messages == first.messages
    assert len({first.name, second.name, third.name}) == 3
    assert second.where.endswith("a.jsonl:2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"a\.jsonl:1: no key 'prompt' \(keys: text\)"),
        ({"prompt": 5}, r"'prompt' is int, not a string"),
        ({"messages": []}, r"a\.jsonl:1: 'messages' is empty; end it with what is to be answered"),
        ({"messages": "x"}, r"message 0 of 'messages' is not of the form"),
        ({"messages": [{"role": "user"}]}, r"message 0 of 'messages' is not of the form .*; correct the line"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            r"'messages' ends with an answer; end it with what",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_line(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl", row)

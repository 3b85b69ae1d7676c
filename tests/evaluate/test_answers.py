"""Answers of a server that speaks the OpenAI protocol: what it is asked, its moods, and restarts."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_adapt.config import CalibrationSettings, MakeCalibration
from megatron_adapt.corpus.documents import read_documents
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.evaluate import answers
from megatron_adapt.evaluate.calibration import make_calibration
from tests.evaluate.chat_models import serve, write_chat_tokenizer, write_prompts

PROMPTS = [f"say {word}" for word in "one two three four five six".split()]
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and then?"},
]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(answers, "_PAUSES", (0.0, 0.0, 0.0))
    with serve() as fake:
        yield fake


@pytest.fixture
def ask(tmp_path, server):
    """Let the server answer prompts; return the texts in order."""
    folder = write_chat_tokenizer(tmp_path / "chat")

    def ask(prompts=PROMPTS, url=None, server_model="", **settings):
        config = MakeCalibration(
            prompts=(write_prompts(tmp_path / "prompts.jsonl", prompts),),
            server=url or server.url,
            server_model=server_model,
            tokenizer=folder,
            output=tmp_path / "out.jsonl.zst",
            settings=CalibrationSettings(**{"batch_size": 3, **settings}),
        )
        make_calibration(config)
        return [document for _, document in read_documents([config.output])]

    return ask


def test_answers_are_written_in_the_order_of_the_prompts(ask, server):
    found = ask([*PROMPTS, CHAT])
    assert [row["text"] for row in found] == [*map(str.upper, PROMPTS), "AND THEN?"]
    assert found[0]["prompt"] == "<|im_start|>user\nsay one<|im_end|>\n<|im_start|>assistant\n"
    assert "hello" in found[-1]["prompt"]
    asked = {body["messages"][-1]["content"]: body for body in server.asked}
    assert asked["and then?"]["messages"] == CHAT
    assert {body["model"] for body in server.asked} == {"small"}
    assert sorted(body["seed"] for body in server.asked) == list(range(1234, 1241))


def test_the_tool_does_the_same(ask, server, tmp_path):
    expected = ask()
    tool = Path(__file__).parents[2] / "tools" / "make_calibration.py"
    flags = {"prompts": "prompts.jsonl", "server": server.url, "tokenizer": "chat", "output": "new/out.jsonl.zst"}
    command = [sys.executable, str(tool), *(text for flag, value in flags.items() for text in (f"--{flag}", value))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert [document for _, document in read_documents([tmp_path / "new" / "out.jsonl.zst"])] == expected


def test_settings_reach_the_server(ask, server):
    ask(PROMPTS[:1], url=f"{server.url}/v1/", server_model="big", temperature=0.7, max_new_tokens=5, seed=9)
    (body,) = server.asked
    assert body == {
        "model": "big", "messages": [{"role": "user", "content": "say one"}], "max_tokens": 5, "temperature": 0.7,
        "seed": 9,
    }  # fmt: skip


def test_a_server_that_is_busy_is_asked_again(ask, server):
    server.failures = [(503, b"loading"), (429, b"slow down"), (200, b"no json")]
    assert len(ask()) == 6
    assert len(server.asked) == 9


def test_a_server_that_stays_busy_ends_the_run_and_the_next_one_goes_on(ask, server, tmp_path):
    expected = ask()
    (tmp_path / "out.jsonl.zst").unlink()
    server.asked.clear()
    reply = server.reply
    server.reply = lambda path, body: (
        (503, b"over\nloaded") if body and body["messages"][0]["content"] == "say five" else reply(path, body)
    )
    with pytest.raises(ConfigError, match="chat/completions gives no answer in 4 tries, lastly '503 over loaded'; see"):
        ask(batch_size=1)
    assert not (tmp_path / "out.jsonl.zst").exists()
    before = len(server.asked)
    assert before >= 4
    server.reply = reply
    assert ask(batch_size=2) == expected
    assert len(server.asked) == 6, "what was answered is not asked for again"
    assert not list(tmp_path.glob(".*"))


def test_a_refusal_is_not_repeated(ask, server):
    server.failures = [(400, b'{"error": "too many tokens"}')] * 6
    with pytest.raises(ConfigError, match=r"refuses the request: 400 .*too many tokens"):
        ask(batch_size=1)
    assert len(server.asked) <= 2  # one may be under way


def test_no_server_is_one_clear_error_and_leaves_nothing(ask, tmp_path):
    with socket.socket() as silent:  # taken, so that nobody else can answer there
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{url}/v1/models gives no answer in 4 tries, lastly .*refused.*; see"):
            ask(url=url)
    assert not list(tmp_path.glob(".*"))


def test_a_server_without_models_must_be_told_one(ask, server):
    server.models = []
    with pytest.raises(ConfigError, match=r"--server-model: .* lists no model; name the one that answers"):
        ask()


def test_a_reply_in_another_form_is_shown(ask, server):
    server.failures = [(200, json.dumps({"text": "x"}).encode())] * 6
    with pytest.raises(ConfigError, match=r"sent '\{\"text\": \"x\"\}' for .*prompts\.jsonl:1, no chat completion"):
        ask(batch_size=1)


def test_answers_that_the_server_cut_off_are_left_out(ask, server):
    server.finish_reason = "length"
    with pytest.raises(DataError, match=r"none of 6 prompts has an answer \(\{'unfinished': 6\}\)"):
        ask()

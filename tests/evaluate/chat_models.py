"""A tiny instruct model that chats in ChatML, and a server that stands in for one."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
from tokenizers import AddedToken, Tokenizer

from tests.helpers.tiny import write_byte_tokenizer, write_llama

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write a byte-level tokenizer of 302 ids that ends turns and documents with ``<|im_end|>``."""
    write_byte_tokenizer(folder, 300)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (START, END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_chat_model(folder: Path, ends: tuple[int, ...] = (301, *range(160, 300))) -> Path:
    """Write a model with random weights, whose answers end with any of ``ends``, that is soon."""
    write_llama(folder, vocab_size=302, tokenizer=False)
    write_chat_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends), "top_k": 3}))
    return folder


def write_prompts(path: Path, prompts: list) -> Path:
    """Write prompts, texts or chats, as JSON lines."""
    rows = [{"prompt": item} if isinstance(item, str) else {"messages": item} for item in prompts]
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    return path


class FakeServer:
    """Answers chats in capitals; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.failures: list[tuple[int, bytes]] = []
        "Status and body of what it answers first."
        self.models = ["small"]
        self.finish_reason = "stop"
        self.url = ""

    def reply(self, path: str, body: dict | None) -> tuple[int, bytes]:
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": name} for name in self.models]}).encode()
        assert path == "/v1/chat/completions"
        self.asked.append(body)
        if self.failures:
            return self.failures.pop(0)
        message = {"role": "assistant", "content": body["messages"][-1]["content"].upper()}
        return 200, json.dumps({"choices": [{"message": message, "finish_reason": self.finish_reason}]}).encode()


@contextmanager
def serve():
    """Run a server on this machine."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(*fake.reply(self.path, None))

        def do_POST(self):
            self._send(*fake.reply(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _send(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""Answers of an instruct model to chats, by transformers or by a server that speaks the OpenAI protocol.

Guarantees: with the same settings a chat gets the same answer from ``ModelAnswers``, whichever answers are known
already: batches are cut from all chats, and each draws from a seed of its own. A server's answers are its own affair;
it is given a seed.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import AutoTokenizer, GenerationConfig

from megatron_adapt.config import CalibrationSettings
from megatron_adapt.corpus.chats import Chat, Message
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.evaluate.bits_per_byte import load_model
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer

Outcome = Literal["answered", "unfinished", "empty", "too_long"]
_PAUSES = (1.0, 2.0, 4.0, 8.0)
"Seconds between two tries of a request."
_BUSY = (408, 429)
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Answer:
    """What came of a chat."""

    text: str
    outcome: Outcome
    "unfinished: cut off at ``max_new_tokens``. too_long: the prompt and an answer do not fit the model's positions."


class Answerer(Protocol):
    """Answers chats."""

    def answer(self, chats: Sequence[Chat], known: AbstractSet[int]) -> Iterator[dict[int, Answer]]:
        """Yield the answers of the chats whose numbers are not ``known``, some at a time, in any order."""


class ChatFormat:
    """The chat template of a folder.

    Raises:
        DataError: there is no tokenizer, or it has no template.
    """

    def __init__(self, folder: Path) -> None:
        self.loaded: LoadedTokenizer = read_tokenizer(folder)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{folder}: transformers cannot load the tokenizer ({reason}); mend the folder") from None
        if not self.tokenizer.chat_template:
            raise DataError(f"{folder}: the tokenizer has no chat template; name an instruct model's folder")

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Return the text that the model goes on from."""
        return self._render(messages, add_generation_prompt=True)

    def make_document(self, chat: Chat, answer: str) -> dict[str, str]:
        """Return the chat and its answer as a prompt, which bears no loss, and a text.

        What ``tools/preprocess_data.py`` adds is left out: BOS at the beginning, and EOS at the end.

        Raises:
            DataError: the template writes what goes before an answer otherwise than the prompt.
        """
        prompt = self.render_prompt(chat.messages)
        whole = self._render([*chat.messages, {"role": "assistant", "content": answer}])
        if not whole.startswith(prompt):
            raise DataError(
                f"{chat.where}: the chat template of {self.loaded.folder} writes a chat with an answer otherwise than "
                "the prompt alone; leave out what it changes, such as earlier answers with thoughts"
            )
        text = whole[len(prompt) :].rstrip()
        if self.tokenizer.eos_token:
            text = text.removesuffix(self.tokenizer.eos_token)
        if self.loaded.adds_bos and self.tokenizer.bos_token:
            prompt = prompt.removeprefix(self.tokenizer.bos_token)
        return {"id": chat.name, "prompt": prompt, "text": text}

    def _render(self, messages: Sequence[Message], **settings: Any) -> str:
        found: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
        return found


class ModelAnswers:
    """A model in this process, on the GPU if there is one.

    Raises:
        CheckpointError: the model is incomplete.
        ConfigError: it is not supported.
    """

    def __init__(self, folder: Path, chat_format: ChatFormat, settings: CalibrationSettings) -> None:
        self._format, self._settings = chat_format, settings
        self._model = load_model(folder, chat_format.loaded, 1)
        ends = self._model.generation_config.eos_token_id
        ends = chat_format.loaded.eos_id if ends is None else ends
        if ends is None:
            raise DataError(f"{folder}: no token ends an answer; name eos_token_id in generation_config.json")
        self._ends = set(ends if isinstance(ends, list) else [ends])

    def answer(self, chats: Sequence[Chat], known: AbstractSet[int]) -> Iterator[dict[int, Answer]]:
        """Yield the answers of a batch at a time; chats of similar length go together."""
        prompts = [
            self._format.tokenizer(self._format.render_prompt(chat.messages), add_special_tokens=False).input_ids
            for chat in chats
        ]
        most = self._model.config.max_position_embeddings - self._settings.max_new_tokens
        order = sorted(range(len(chats)), key=lambda at: (len(prompts[at]), at))
        fitting = [at for at in order if 0 < len(prompts[at]) <= most]
        yield {at: Answer("", "too_long") for at in set(order) - set(fitting) - known}
        for start in range(0, len(fitting), self._settings.batch_size):
            batch = fitting[start : start + self._settings.batch_size]
            if not all(at in known for at in batch):
                torch.manual_seed(self._settings.seed + start)
                yield dict(zip(batch, self._generate([prompts[at] for at in batch]), strict=True))

    def _generate(self, prompts: Sequence[list[int]]) -> list[Answer]:
        longest, pad = max(map(len, prompts)), min(self._ends)
        ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        draws = self._settings.temperature > 0
        config = GenerationConfig(
            max_new_tokens=self._settings.max_new_tokens,
            eos_token_id=sorted(self._ends),
            pad_token_id=pad,
            do_sample=draws,
            **({"temperature": self._settings.temperature, "top_p": 1.0, "top_k": 0} if draws else {}),
        )
        device = self._model.device
        with torch.inference_mode():
            found_BT = self._model.generate(
                ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=config
            )
        return [self._read(ids) for ids in found_BT[:, longest:].tolist()]

    def _read(self, ids: list[int]) -> Answer:
        length = next((at for at, index in enumerate(ids) if index in self._ends), None)
        text = self._format.tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
        return _judge(text, is_finished=length is not None)


class ServerAnswers:
    """A server such as vLLM, llama.cpp or SGLang.

    Raises:
        ConfigError: it does not answer, or not in the protocol.
    """

    def __init__(self, url: str, model: str, settings: CalibrationSettings) -> None:
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        self._settings = settings
        # The system's proxies are for other machines.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.model: str = model or self._get_first_model()

    def answer(self, chats: Sequence[Chat], known: AbstractSet[int]) -> Iterator[dict[int, Answer]]:
        """Yield answers one by one as they come; ``batch_size`` requests are under way."""
        failed: ConfigError | None = None
        with ThreadPoolExecutor(self._settings.batch_size) as pool:
            asked = {pool.submit(self._ask, at, chat): at for at, chat in enumerate(chats) if at not in known}
            try:
                for future in as_completed(asked):
                    try:
                        answer = future.result()
                    except CancelledError:
                        continue
                    except ConfigError as error:
                        failed = failed or error
                        for other in asked:  # those under way end, and count
                            other.cancel()
                        continue
                    yield {asked[future]: answer}
            finally:
                pool.shutdown(cancel_futures=True)
        if failed:
            raise failed

    def _ask(self, number: int, chat: Chat) -> Answer:
        body = {
            "model": self.model,
            "messages": list(chat.messages),
            "max_tokens": self._settings.max_new_tokens,
            "temperature": self._settings.temperature,
            "seed": self._settings.seed + number,
        }
        found = self._request("/chat/completions", body)
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"] or ""
            return _judge(text.strip(), is_finished=choice["finish_reason"] == "stop")
        except (LookupError, TypeError, AttributeError):
            raise ConfigError(
                f"--server: {self._url} sent {json.dumps(found)[:_SHOWN_CHARACTERS]!r} for {chat.where}, no chat "
                "completion; name a server of the OpenAI protocol"
            ) from None

    def _get_first_model(self) -> str:
        found = self._request("/models", None)
        try:
            return str(found["data"][0]["id"])
        except (LookupError, TypeError):
            raise ConfigError(f"--server-model: {self._url} lists no model; name the one that answers") from None

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        reason = ""
        for pause in (0.0, *_PAUSES):
            time.sleep(pause)
            try:
                with self._opener.open(request, timeout=self._settings.timeout_seconds) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                said = " ".join(error.read().decode(errors="replace").split())[:_SHOWN_CHARACTERS]
                reason = f"{error.code} {said}"
                if error.code < 500 and error.code not in _BUSY:
                    raise ConfigError(f"--server: {self._url}{path} refuses the request: {reason}") from None
            except (OSError, HTTPException, ValueError) as error:  # time-outs and what is no JSON, too
                reason = str(error) or type(error).__name__
        raise ConfigError(
            f"--server: {self._url}{path} gives no answer in {1 + len(_PAUSES)} tries, lastly {reason!r}; see whether "
            "the server runs, and start again to go on"
        )


def _judge(text: str, *, is_finished: bool) -> Answer:
    return Answer(text, "unfinished" if not is_finished else "answered" if text else "empty")

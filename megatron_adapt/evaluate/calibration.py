"""Self-calibration: prompts answered by the original instruct model, to train its adapted version on (LEP, section 4).

After propagation the new rows fit the instruct model's body only as far as a linear map does. A short training on
answers that the model itself gave before brings them in tune and teaches nothing new (arXiv 2412.21140: 13,531 prompts
answered greedily; long copies of articles beside them helped as much).

Reads: prompts (``corpus/chats.py``) and an instruct model or a server that runs one. Writes: NAME.jsonl.zst, documents
``{"id", "prompt", "text"}`` in the order of the prompts, and NAME.stage.json. ``tools/preprocess_data.py --prompt-key
prompt --append-eod`` makes tokens of them that bear loss on the answers alone. Guarantees: the output appears whole; a
run that was killed asks only for what is missing and ends with the same documents; answers that were cut off, empty, or
that no room is left for, are left out and counted.

1. ``ChatFormat`` writes prompts by the model's chat template;
2. ``ModelAnswers`` or ``ServerAnswers`` answers (``answers.py``); each answer is noted in .NAME.answers (``_Notes``);
3. ``_write_documents`` writes those that ended by themselves.

Costs: those of generation; all prompts and answers in memory.
"""

import fcntl
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import orjson

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.checkpoint.resume import fingerprint_plan
from megatron_adapt.config import MakeCalibration
from megatron_adapt.config.calibration import OUTPUT_ENDING
from megatron_adapt.corpus.chats import Chat, read_chats
from megatron_adapt.corpus.documents import DocumentWriter
from megatron_adapt.corpus.inputs import find_files
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.evaluate.answers import Answer, Answerer, ChatFormat, ModelAnswers, ServerAnswers
from megatron_adapt.files import STAGE_FILE, replace_file, write_stage
from megatron_adapt.logs import show_progress

_logger = logging.getLogger(__name__)


def make_calibration(config: MakeCalibration) -> None:
    """Write the answers of the model to all prompts.

    Raises:
        CheckpointError: the model is incomplete.
        ConfigError: the output exists or another run writes it, the model is not supported, or the server fails.
        DataError: a prompt is wrong, the tokenizer has no chat template, or no answer can be used.
    """
    paths = find_files(config.prompts, "--prompts")
    chats = list(read_chats(paths))
    if not chats:
        raise DataError(f"{', '.join(map(str, config.prompts))}: no prompts; name files with some")
    folder = config.model or config.tokenizer
    assert folder is not None
    chat_format = ChatFormat(folder)
    with _open_notes(config, chats, chat_format) as notes:
        missing = len(chats) - len(notes.answers)
        if missing:
            answerer: Answerer
            if config.server is None:
                answerer = ModelAnswers(folder, chat_format, config.settings)
            else:
                answerer = ServerAnswers(config.server, config.server_model, config.settings)
            with show_progress("answering", missing, "prompts") as advance:
                for answers in answerer.answer(chats, notes.answers.keys()):
                    advance(notes.add(answers))
        try:
            counts = _write_documents(config.output, chats, notes.answers, chat_format)
        except DataError:
            notes.path.unlink()  # the same answers would not do the next time
            raise
        record = config.output.with_name(f"{config.output.name.removesuffix(OUTPUT_ENDING)}.{STAGE_FILE}")
        write_stage(record, config=config, inputs=[*paths, folder], counts=counts)
        notes.path.unlink()
    _logger.info("%s: prompts %s", config.output, ", ".join(f"{count:,} {name}" for name, count in counts.items()))


def _write_documents(
    output: Path, chats: Sequence[Chat], answers: dict[int, Answer], chat_format: ChatFormat
) -> dict[str, int]:
    """Write what was answered, in the order of the chats; return the number of chats by what came of them."""
    counts = Counter[str](answer.outcome for answer in answers.values())
    if not counts["answered"]:
        raise DataError(
            f"{output}: none of {len(chats)} prompts has an answer ({dict(counts)}); raise calibration.max_new_tokens "
            "where they are unfinished, lower it where they are too long"
        )
    with replace_file(output) as partial, DocumentWriter(partial) as writer:
        for number, chat in enumerate(chats):
            if answers[number].outcome == "answered":
                writer.write(chat_format.make_document(chat, answers[number].text))
    return dict(counts)


class _Notes:
    """Answers that are on disk: a line of JSON for each, behind one that names the plan."""

    def __init__(self, path: Path, descriptor: int, plan: str) -> None:
        self.path = path
        self.answers: dict[int, Answer] = {}
        self._descriptor = descriptor
        with open(descriptor, "rb", closefd=False) as file:
            first, *lines = file.read().splitlines(keepends=True) or [b""]
        self.is_continued = first == f"{plan}\n".encode()
        whole = [line for line in lines if line.endswith(b"\n")] if self.is_continued else []
        for line in whole:
            row = orjson.loads(line)
            number = row.pop("number")
            self.answers[number] = Answer(**row)
        self.has_other = bool(first) and not self.is_continued
        self._kept_bytes = sum(map(len, [first, *whole])) if self.is_continued else 0
        self._plan = plan

    def begin(self) -> None:
        """Cut off what a kill left of a line, or begin anew."""
        os.ftruncate(self._descriptor, self._kept_bytes)
        if not self.is_continued:
            self._append(f"{self._plan}\n".encode())

    def add(self, answers: dict[int, Answer]) -> int:
        """Note answers; return how many were not known."""
        new = {number: answer for number, answer in answers.items() if number not in self.answers}
        lines = [
            orjson.dumps({"number": number, **asdict(answer)}, option=orjson.OPT_APPEND_NEWLINE)
            for number, answer in new.items()
        ]
        self._append(b"".join(lines))
        self.answers |= new
        return len(new)

    def _append(self, data: bytes) -> None:
        os.lseek(self._descriptor, 0, os.SEEK_END)
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)


@contextmanager
def _open_notes(config: MakeCalibration, chats: Sequence[Chat], chat_format: ChatFormat) -> Iterator[_Notes]:
    """Yield what an earlier run of the same plan noted; notes are kept whatever happens."""
    # Requests do not depend on one another, rows of a batch do in the last bits.
    settings = config.settings if config.server is None else replace(config.settings, batch_size=1, timeout_seconds=1)
    files = [] if config.model is None else HFFolder(config.model).files
    asked = [list(chat.messages) for chat in chats]
    plan = fingerprint_plan(
        asked, settings, config.server, config.server_model, chat_format.loaded.fingerprint, files=files
    )
    path = config.output.with_name(f".{config.output.name}.answers")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{config.output}: another run is writing it; wait for it or name another") from None
        notes = _Notes(path, descriptor, plan)
        if config.output.exists() and not (config.overwrite or notes.is_continued):
            if not notes.has_other:
                path.unlink()
            raise ConfigError(f"{config.output}: exists already; name another output or add --overwrite")
        if notes.has_other and not config.overwrite:
            raise ConfigError(
                f"{path}: holds answers of an unfinished run with other prompts or settings; name another output, or "
                "add --overwrite to drop them"
            )
        if notes.is_continued:
            _logger.info("%s: goes on behind %d answers", config.output, len(notes.answers))
        notes.begin()
        try:
            yield notes
        finally:
            if not notes.answers:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)

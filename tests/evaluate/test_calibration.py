"""Prompts answered by a tiny model: what is written, what bears loss, and what a kill costs."""

import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_adapt.config import CalibrationSettings, DataSettings, MakeCalibration, PreprocessData
from megatron_adapt.corpus.documents import read_documents
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.index import read_tokens
from megatron_adapt.data.prompts import mask_prompts, read_prompts
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.evaluate import answers
from megatron_adapt.evaluate.calibration import make_calibration
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.evaluate.chat_models import END, TEMPLATE, write_chat_model, write_chat_tokenizer, write_prompts

PROMPTS = [
    *(f"abc {'de ' * at}?" for at in range(12)),
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts.jsonl", PROMPTS)


def calibrate(model, prompts, output, *, overwrite=False, **settings):
    settings = CalibrationSettings(**{"max_new_tokens": 24, "batch_size": 4, **settings})
    make_calibration(
        MakeCalibration(prompts=(prompts,), model=model, output=output, overwrite=overwrite, settings=settings)
    )
    return [document for _, document in read_documents([output])]


def read_counts(output):
    return json.loads(output.with_name("out.stage.json").read_text())["counts"]


def test_answers_are_those_of_the_model_in_the_order_of_the_prompts(model, prompts, tmp_path):
    found = calibrate(model, prompts, tmp_path / "out.jsonl.zst")
    counts = read_counts(tmp_path / "out.jsonl.zst")
    assert sum(counts.values()) == len(PROMPTS)
    assert len(found) == counts["answered"] > 5
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    expected = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")
        with torch.no_grad():
            new = loaded.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=1)[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(new[:-1], skip_special_tokens=True).strip()
        if new[-1] >= 160 and text:
            whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": text}], tokenize=False)
            expected.append((whole.removeprefix("<s>").removesuffix(f"{END}\n"), text))
    assert [(row["prompt"] + row["text"], row["text"]) for row in found] == expected
    assert len({row["id"] for row in found}) == len(found)


def test_batches_do_not_change_greedy_answers(model, prompts, tmp_path):
    one, five = (calibrate(model, prompts, tmp_path / f"{n}.jsonl.zst", batch_size=n) for n in (1, 5))
    assert one == five


def test_the_tokens_are_those_of_the_template_and_only_answers_bear_loss(model, prompts, tmp_path):
    documents = calibrate(model, prompts, tmp_path / "out.jsonl.zst")
    settings = DataSettings(prompt_key="prompt", append_eod=True)
    preprocess_data(
        PreprocessData(
            input=(tmp_path / "out.jsonl.zst",), tokenizer=model, output_prefix=tmp_path / "tokens", settings=settings
        )
    )
    tokens, counts_D = read_tokens(tmp_path / "tokens"), read_prompts(tmp_path / "tokens", len(documents))
    encode = read_tokenizer(model).tokenizer.encode
    starts = [0]
    for number, document in enumerate(documents):
        prompt = encode(f"<s>{document['prompt']}", add_special_tokens=False).ids
        whole = encode(f"<s>{document['prompt']}{document['text']}{END}", add_special_tokens=False).ids
        assert counts_D[number] == len(prompt)
        starts.append(starts[-1] + len(whole))
        np.testing.assert_array_equal(tokens.tokens_N[starts[-2] : starts[-1]], whole)
        assert whole[0] == 0
        assert whole.count(0) == 1, "one BOS"
        assert whole[-1] == 301
        assert whole[-2] != 301, "one end"
    mask_T = mask_prompts(np.array(starts), counts_D, np.array([0]), starts[-1] - 1)[0]
    is_answer = np.concatenate([np.arange(b - a) >= n for a, b, n in zip(starts, starts[1:], counts_D, strict=False)])
    np.testing.assert_array_equal(mask_T, is_answer[1:])


def stop_after(monkeypatch, num_batches):
    """Let generation be interrupted; return the batches that were asked for."""
    original, asked = answers.ModelAnswers._generate, []

    def generate(self, prompts):
        asked.append(len(prompts))
        if len(asked) > num_batches:
            raise KeyboardInterrupt
        return original(self, prompts)

    monkeypatch.setattr(answers.ModelAnswers, "_generate", generate)
    return asked


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_run_that_was_killed_asks_for_what_is_missing_and_ends_the_same(
    model, prompts, tmp_path, monkeypatch, temperature, num_batches
):
    expected = calibrate(model, prompts, tmp_path / "whole.jsonl.zst", temperature=temperature)
    output = tmp_path / "out.jsonl.zst"
    with monkeypatch.context() as patch:
        stop_after(patch, num_batches)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, prompts, output, temperature=temperature)
    assert not output.exists()
    with (tmp_path / ".out.jsonl.zst.answers").open("ab") as file:
        file.write(b'{"number": 12, "te')  # what a kill may leave
    asked = stop_after(monkeypatch, 99)
    assert calibrate(model, prompts, output, temperature=temperature) == expected
    assert len(asked) == 4 - num_batches
    assert output.read_bytes() == (tmp_path / "whole.jsonl.zst").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_answers_of_another_plan_are_not_mixed_in(model, prompts, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl.zst"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, prompts, output)
    with pytest.raises(ConfigError, match="holds answers of an unfinished run with other prompts or settings; name"):
        calibrate(model, prompts, output, max_new_tokens=20)
    expected = calibrate(model, prompts, tmp_path / "whole.jsonl.zst", max_new_tokens=20)
    assert calibrate(model, prompts, output, max_new_tokens=20, overwrite=True) == expected


def test_an_existing_output_is_kept_unless_told_otherwise(model, prompts, tmp_path):
    output = tmp_path / "out.jsonl.zst"
    before = calibrate(model, prompts, output)
    with pytest.raises(ConfigError, match="exists already; name another output or add --overwrite"):
        calibrate(model, prompts, output, seed=2)
    assert not list(tmp_path.glob(".*"))
    assert calibrate(model, prompts, output, temperature=2.0, overwrite=True) != before


def test_two_runs_do_not_write_one_output(model, prompts, tmp_path):
    descriptor = os.open(tmp_path / ".out.jsonl.zst.answers", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another run is writing it; wait for it or name another"):
        calibrate(model, prompts, tmp_path / "out.jsonl.zst")
    os.close(descriptor)


def test_answers_that_were_cut_off_or_have_no_room_are_left_out_and_counted(model, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", [*PROMPTS[:6], "ab" * 200])
    found = calibrate(model, prompts, tmp_path / "out.jsonl.zst", max_new_tokens=4)
    counts = read_counts(tmp_path / "out.jsonl.zst")
    assert counts["too_long"] == 1
    assert len(found) == counts["answered"] < 6
    assert sum(counts.values()) == 7


def test_no_answer_at_all_is_refused_and_nothing_is_left(tmp_path, prompts):
    model = write_chat_model(tmp_path / "model", ends=(301,))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"none of 13 prompts has an answer \(.*'unfinished'.*\); raise calibration"):
        calibrate(model, prompts, tmp_path / "out.jsonl.zst", max_new_tokens=2)
    assert sorted(tmp_path.iterdir()) == before


def test_answers_must_be_able_to_end(tmp_path, prompts):
    model = write_chat_model(tmp_path / "model")
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}))
    raw = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(raw.replace('"</s>"', '"<end>"'))
    with pytest.raises(DataError, match=r"no token ends an answer; name eos_token_id in generation_config\.json"):
        calibrate(model, prompts, tmp_path / "out.jsonl.zst")


def test_a_model_without_a_template_is_refused(tmp_path, prompts):
    folder = write_chat_tokenizer(tmp_path / "plain", template=None)
    with pytest.raises(DataError, match="plain: the tokenizer has no chat template; name an instruct model's folder"):
        calibrate(folder, prompts, tmp_path / "out.jsonl.zst")


def test_a_tokenizer_that_transformers_cannot_load_is_refused(tmp_path, prompts, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such class\nmore")

    monkeypatch.setattr(answers.AutoTokenizer, "from_pretrained", fail)
    folder = write_chat_tokenizer(tmp_path / "broken")
    with pytest.raises(DataError, match=r"broken: transformers cannot load the tokenizer \(no such class\); mend the"):
        calibrate(folder, prompts, tmp_path / "out.jsonl.zst")


def test_a_template_that_rewrites_what_goes_before_an_answer_is_refused(tmp_path, prompts):
    model = write_chat_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages | length }}" + TEMPLATE)
    with pytest.raises(DataError, match=r"prompts\.jsonl:\d+: the chat template of .* writes a chat with an answer"):
        calibrate(model, prompts, tmp_path / "out.jsonl.zst")


def test_no_prompts_are_refused(model, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no prompts; name files with some"):
        calibrate(model, tmp_path / "empty.jsonl", tmp_path / "out.jsonl.zst")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--model, --server: name one of the two"),
        ({"server": "http://x"}, "--model, --server: name one of the two"),
        ({"model": None, "server": "localhost:8000"}, "--server: localhost:8000 is no URL; write http"),
        ({"model": None, "server": "http://x"}, "--tokenizer: missing; name the folder with the chat template"),
        ({"tokenizer": "x"}, "--tokenizer: has no effect with --model"),
        ({"server_model": "x"}, "--server-model: has no effect with --model"),
        ({"output": "out.jsonl"}, r"--output: out\.jsonl does not end in \.jsonl\.zst"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, changes, message):
    paths = {key: Path(value) if key in ("tokenizer", "output") else value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=message):
        MakeCalibration(**{"prompts": (tmp_path,), "output": Path("a.jsonl.zst"), "model": tmp_path, **paths})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_new_tokens", 0, r"calibration\.max_new_tokens: 0 is below 1; use 1 or more"),
        ("batch_size", 0, r"calibration\.batch_size: 0 is below 1"),
        ("temperature", -0.5, r"calibration\.temperature: -0\.5 is below 0; use 0 or more"),
        ("seed", -1, r"calibration\.seed: -1 is below 0"),
        ("timeout_seconds", 0.0, r"calibration\.timeout_seconds: 0\.0 is not above 0; use 600"),
    ],
)
def test_settings_out_of_range_are_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationSettings(**{name: value})

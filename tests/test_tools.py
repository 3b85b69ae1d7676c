"""The tools as a user calls them: a mistake is one clear line, exit code 2, and no half-written output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import make_run, write_documents
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama

TOOLS = Path(__file__).parents[1] / "tools"


def call(tool, *args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def assert_refused(result, message, *outputs):
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    for output in outputs:
        leftovers = [item for item in output.parent.iterdir() if output.name in item.name]
        assert leftovers == [], leftovers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "documents.jsonl is not a file; check the path"),
        ('{"text": "good"}\n{"text": bad}\n', "documents.jsonl:2: no valid JSON"),
        ('{"text": "good"}\n{"body": "x"}\n', "documents.jsonl:2: no key 'text' (keys: body)"),
        ('{"text": "good"}\n{"text": 7}\n', "documents.jsonl:2: 'text' is int, not a string"),
        ("", "no documents"),
        ('["a"]\n', "documents.jsonl:1: a JSON list, not an object"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_documents_are_named_by_file_and_line(tokenizer, tmp_path, content, message, workers):
    path = tmp_path / "documents.jsonl"
    if content is not None:
        path.write_text(content)
    output = tmp_path / "out"
    result = call(
        "preprocess_data", "--input", path, "--tokenizer", tokenizer, "--output-prefix", output,
        "--append-eod", "--workers", workers,
    )  # fmt: skip
    assert_refused(result, message, output)


def test_empty_corpus_stops_the_preparation(tmp_path):
    path = write_documents(tmp_path / "empty.jsonl", [""])
    result = call("prepare_corpus", "--input", path, "--output", tmp_path / "corpus")
    assert_refused(result, "empty.jsonl", tmp_path / "corpus")


def test_vocabulary_that_does_not_match_is_refused_with_both_numbers(tmp_path):
    recipe = make_run(tmp_path)
    checkpoint = tmp_path / "run" / "megatron"
    larger = write_extended_tokenizer(tmp_path / "hf", tmp_path / "larger", [("ab", "c")])
    result = call(
        "convert_checkpoint", "--source", checkpoint, "--to", "hf", "--output", tmp_path / "export",
        "--tokenizer", larger,
    )  # fmt: skip
    assert_refused(result, "301", tmp_path / "export")
    assert "300" in result.stderr
    assert recipe.is_file()


def test_tensor_parallel_size_that_does_not_divide_the_heads_is_refused(tmp_path):
    recipe = make_run(tmp_path)
    result = call(
        "pretrain", "--recipe", recipe, "--stage", "first", "--train.tensor-model-parallel-size", "4"
    )  # fmt: skip
    assert_refused(result, "train.tensor_model_parallel_size: 4 does not fit the model's 2 key-value heads")
    files = ["--corpus.en", tmp_path / "raw" / "en-train.jsonl", "--corpus.xx", tmp_path / "raw" / "xx-train.jsonl"]
    result = call("adapt", "--recipe", recipe, *files, "--train.tensor-model-parallel-size", "4")
    assert_refused(result, "use 1 or 2")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_unknown_recipe_key_is_refused_with_the_nearest_name(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('work_dir = "run"\nold_languages = ["en"]\nnew_languages = ["xx"]\n[train]\nseq_lenght = 5\n')
    for tool, flags in (("adapt", []), ("pretrain", ["--stage", "x"]), ("plan_blend", [])):
        result = call(tool, "--recipe", recipe, *flags)
        assert_refused(result, "train.seq_lenght: unknown setting; did you mean train.seq_length?")


def test_recipe_without_files_says_which_flag_is_missing(tmp_path):
    hf = write_llama(tmp_path / "hf")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'work_dir = "{tmp_path}/run"\nbase_model = "{hf}"\nold_languages = ["en"]\nnew_languages = ["xx"]\n'
        '[corpus]\nen = []\nxx = ["gone.jsonl"]\n[[train.stages]]\nname = "a"\ntokens = 1\nblend = { xx = 1 }\n'
    )
    assert_refused(
        call("adapt", "--recipe", recipe), "corpus.en: names no file; add --corpus.en FILE", tmp_path / "run"
    )
    result = call("adapt", "--recipe", recipe, "--corpus.en", recipe)
    assert_refused(result, "corpus.xx: gone.jsonl is not a file", tmp_path / "run")


def test_wrong_flag_exits_with_code_2():
    result = call("preprocess_data", "--imput", "x")
    assert result.returncode == 2
    assert "--imput" in result.stderr + result.stdout

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_adapt.config import (
    BuildTokenizer,
    ConvertCheckpoint,
    CorpusSettings,
    Evaluate,
    MeasureTokenizer,
    PrepareCorpus,
    PreprocessData,
    TokenizerSettings,
)
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import write_json
from megatron_adapt.flags import load_command, load_config, load_recipe, run_tool, split_pairs, to_flags
from megatron_adapt.recipe import read_recipe

SETTINGS = CorpusSettings(valid_share=0.25, max_bytes=7)
TOOLS = sorted((Path(__file__).parents[1] / "tools").glob("*.py"))
RECIPE = """
work_dir = "run"
old_languages = ["en"]
new_languages = "ja"
base_model = "base"
[corpus]
en = "en.jsonl"
ja = ["a.jsonl", "b.jsonl"]
[tokenizer]
size = "extend50"
scripts = ["Han", "Hiragana"]
[train]
seq_length = 256
[[train.stages]]
name = "embeddings"
tokens = 1000
blend = { en = 1, ja = 9.0 }
trainable = "embeddings"
"""


def write_recipe(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


# ---------------------------------------------------------------- flags


def test_settings_are_flat_flags():
    config = load_config(PrepareCorpus, ["--input", "a", "b", "--output", "c", "--valid-share", "0.5", "--overwrite"])
    assert config.input == (Path("a"), Path("b"))
    assert config.settings.valid_share == 0.5
    assert config.overwrite


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--input", "a", "--output", "b", "--valid-share", "2"], "prepare.valid_share: 2.0 is not between 0 and 1"),
        (["--input", "a"], "--output"),
        (["--input", "a", "--output", "b", "--valid-chair", "0.1"], "--valid-chair"),
        (["--input", "a", "--output", "b", "--max-bytes", "many"], "many"),
    ],
)
def test_a_wrong_flag_exits_with_two_and_names_itself(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(PrepareCorpus, argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        PrepareCorpus(input=(Path("a"), Path("b")), output=Path("c"), overwrite=True, settings=SETTINGS),
        BuildTokenizer(
            base=Path("a"), corpus=(Path("b"),), output=Path("c"), settings=TokenizerSettings(scripts=("Han", "Arabic"))
        ),
        ConvertCheckpoint(source=Path("a"), to="hf", output=Path("b"), tokenizer=Path("c"), verify=True),
        PreprocessData(input=(Path("a"),), tokenizer=Path("b"), output_prefix=Path("c")),
        Evaluate(models=("m=a", "n=b"), corpora=("en=c",), json=Path("d")),
    ],
    ids=lambda config: type(config).__name__,
)
def test_flags_made_from_a_config_read_back_as_it(config):
    assert load_config(type(config), to_flags(config)) == config


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_help_imports_neither_torch_nor_megatron(tool):
    command = [sys.executable, "-X", "importtime", str(tool), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0
    assert "usage:" in done.stdout
    assert "tyro" in imported
    assert not imported & {"torch", "megatron", "transformers"}


# ---------------------------------------------------------------- recipes


def test_a_recipe_becomes_a_config(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path, RECIPE))
    assert recipe.new_languages == ("ja",)
    assert recipe.corpus == {"en": ("en.jsonl",), "ja": ("a.jsonl", "b.jsonl")}
    assert recipe.base_model == Path("base")
    assert recipe.tokenizer.scripts == ("Han", "Hiragana")
    assert recipe.train.stages[0].blend == {"en": 1.0, "ja": 9.0}
    assert recipe.train.seq_length == 256
    assert recipe.train.micro_batch_size == 4


def test_a_resolved_recipe_reads_back_from_json(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path, RECIPE))
    write_json(tmp_path / "recipe.json", recipe)
    assert read_recipe(tmp_path / "recipe.json") == recipe


def test_flags_have_the_last_word_over_the_recipe(tmp_path):
    path = write_recipe(tmp_path, RECIPE)
    argv = ["--recipe", str(path), "--stage", "embeddings", "--train.seq-length", "128", "--work-dir", "other"]
    recipe, stage = load_recipe(argv, stage=True)
    assert stage == "embeddings"
    assert (recipe.train.seq_length, recipe.work_dir) == (128, Path("other"))
    assert recipe.tokenizer.size == "extend50"
    recipe, stage = load_recipe([f"--recipe={path}"])
    assert (recipe.train.seq_length, stage) == (256, "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "seq_length = 256",
            "seq_lenght = 256",
            r"train\.seq_lenght: unknown setting; did you mean train\.seq_length\?",
        ),
        (
            "seq_length = 256",
            "zzz = 1",
            r"train\.zzz: unknown setting; known: tensor_model_parallel_size, .*, stages, ",
        ),
        (
            'name = "emb',
            'named = "emb',
            r"train\.stages\[0\]\.named: unknown setting; did you mean train\.stages\[0\]\.name",
        ),
        ("[tokenizer]", "[tokeniser]", r"tokeniser: unknown setting; did you mean tokenizer\?"),
        ('work_dir = "run"', "", r"work_dir: missing; add it to the recipe"),
        ("tokens = 1000", "", r"train\.stages\[0\]\.tokens: missing; add it to the recipe"),
        ("seq_length = 256", 'seq_length = "256"', r"train\.seq_length: '256' is not int; correct the value"),
        ("seq_length = 256", "seq_length = 256.0", r"train\.seq_length: 256\.0 is not int; correct the value"),
        ("seq_length = 256", "seq_length = true", r"train\.seq_length: True is not int; correct the value"),
        ("seq_length = 256", "bf16 = 1", r"train\.bf16: 1 is not bool; correct the value"),
        ("ja = 9.0", 'ja = "9"', r"train\.stages\[0\]\.blend\.ja: '9' is not float; correct the value"),
        ("en = 1,", "en = 0,", r"train\.stages embeddings: blend\.en 0\.0 is not positive; leave the language out"),
        ('"Hiragana"', "7", r"tokenizer\.scripts\[1\]: 7 is not str; correct the value"),
        (
            'trainable = "emb',
            'trainable = "amb',
            r"train\.stages embeddings: trainable 'ambeddings' is neither embeddings, new_rows, .*; correct it",
        ),
        (
            'trainable = "emb',
            'trainable = ["*", 3] #',
            r"train\.stages\[0\]\.trainable\[1\]: 3 is not str; correct the",
        ),
        ('[tokenizer]\nsize = "extend50"\nscripts = ["Han", "Hiragana"]', "", None),
        ('base_model = "base"', 'base_model = "base"\nvocab = 3', r"vocab: 3 is no table; write it as \[vocab\]"),
        ('work_dir = "run"', "work_dir = run", r"no valid TOML \(.*line 2.*\)"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_dotted_name(tmp_path, old, new, message):
    assert RECIPE.count(old) == 1
    path = write_recipe(tmp_path, RECIPE.replace(old, new))
    if message is None:
        read_recipe(path)
        return
    with pytest.raises(ConfigError, match=rf"^{path}: {message}"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: --recipe: missing; name a recipe such as examples/quickstart/recipe.toml"),
        (["--recipe", "gone.toml"], "error: --recipe: gone.toml is not a file; check the path"),
    ],
)
def test_a_missing_recipe_exits_with_two(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        load_recipe(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip() == message


def test_a_missing_stage_exits_with_two(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        load_recipe(["--recipe", str(write_recipe(tmp_path, RECIPE))], stage=True)
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip() == "error: --stage: missing; name a stage of the recipe"


# ---------------------------------------------------------------- pairs and tools


def test_pairs_collect_the_paths_of_a_name():
    found = split_pairs(["en=a.jsonl", "ja=b=c.jsonl", "en=d.jsonl"], "--corpora")
    assert found == {"en": [Path("a.jsonl"), Path("d.jsonl")], "ja": [Path("b=c.jsonl")]}


@pytest.mark.parametrize("pair", ["en", "=a.jsonl", "en="])
def test_half_a_pair_is_refused(pair):
    with pytest.raises(ConfigError, match=rf"^--corpora: '{pair}' is not NAME=PATH$"):
        split_pairs([pair], "--corpora")


def test_a_users_mistake_is_one_line_and_exit_code_two(capsys):
    def fail(config):
        raise DataError(f"a.jsonl:3: no\nvalid JSON ({config.models}); correct the line")

    with pytest.raises(SystemExit) as caught:
        run_tool(fail, Evaluate(models=("m",), corpora=()))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: a.jsonl:3: no valid JSON (('m',)); correct the line\n"


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 // 0)


def test_one_rank_of_a_machine_prints_the_line(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def fail():
        raise DataError("where: what; remedy")

    with pytest.raises(SystemExit) as caught:
        run_tool(fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        run_tool(fail)
    assert capsys.readouterr().err == "error: rank 8: where: what; remedy\n"


def test_optional_tables_of_a_recipe_have_flags(tmp_path):
    text = RECIPE.replace("base_model", "# base_model") + (
        '\n[base]\nvocab_size = 900\n[base_train]\nname = "scratch"\ntokens = 5\nblend = { en = 1 }\n'
    )
    flags = ["--base.vocab-size", "400", "--base-train.tokens", "77"]
    recipe, _ = load_recipe(["--recipe", str(write_recipe(tmp_path, text)), *flags])
    assert recipe.base is not None
    assert recipe.base_train is not None
    assert (recipe.base.vocab_size, recipe.base_train.tokens) == (400, 77)


def test_a_command_is_named_first_and_the_others_are_listed(capsys):
    kinds = {"measure": MeasureTokenizer}
    name, config = load_command(kinds, ["measure", "--tokenizers", "a=b", "--corpora", "c=d"])
    assert (name, config.tokenizers) == ("measure", ("a=b",))
    for args, message in (
        ([], "error: no command: not one of measure"),
        (["count"], "error: count: not one of measure"),
    ):
        with pytest.raises(SystemExit, match="2"):
            load_command(kinds, args)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        load_command(kinds, ["--help"])
    assert "  measure   Compare tokenizers on corpora" in capsys.readouterr().out

"""The whole pipeline on a tiny recipe: it ends with a model that transformers loads, and repeats nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.checkpoint.release import release_model
from megatron_adapt.commands import Command, run_commands
from megatron_adapt.config import ConvertCheckpoint, ReleaseModel
from megatron_adapt.corpus.parallel import prepare_parallel
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.index import read_tokens
from megatron_adapt.data.prompts import read_prompts
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import STAGE_FILE, write_json, write_stage
from megatron_adapt.flags import load_recipe
from megatron_adapt.pipeline import plan_corpus, plan_results, plan_training, plan_vocabulary, write_results
from megatron_adapt.run_folder import RunFolder
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.helpers.runs import make_run, train_stage

ROOT = Path(__file__).parents[1]
SMALLER = (
    "--base.vocab-size 400 --base.hidden-size 32 --base.ffn-hidden-size 64 --base.num-layers 2 --tokenizer.size 100 "
    "--base-train.tokens 20000 --train.stages.0.tokens 10000 --train.stages.1.tokens 20000 --train.seq-length 64 "
    "--train.micro-batch-size 4 --train.global-batch-size 8 --train.eval-windows 8 --evaluate.max-bytes 5000"
).split()


def plan_adaptation(recipe, run, base_model):
    return [*plan_vocabulary(recipe, run, base_model), *plan_training(recipe, run, base_model)]


def adapt(work_dir, raw, *flags):
    command = [
        sys.executable, "tools/adapt.py", "--recipe", "examples/quickstart/recipe.toml", "--work-dir", str(work_dir),
        "--corpus.en", f"{raw}/en.jsonl", "--corpus.qx", f"{raw}/qx.jsonl", *SMALLER, *flags,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_quickstart_recipe_adapts_a_model_and_a_second_call_repeats_nothing(tmp_path):
    make_corpus = [sys.executable, "examples/quickstart/make_corpus.py", "--documents", "600"]
    subprocess.run([*make_corpus, "--output", str(tmp_path / "raw")], cwd=ROOT, check=True)
    result = adapt(tmp_path / "run", tmp_path / "raw")
    assert result.returncode == 0, result.stderr[-5000:]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert list(evaluation) == ["base", "resized", "embeddings", "full"]
    assert evaluation["full"]["qx"]["bits_per_byte"] < 0.9 * evaluation["resized"]["qx"]["bits_per_byte"]
    assert "| full" in (tmp_path / "run" / "report.md").read_text()
    _check_export(tmp_path / "run")
    card = (tmp_path / "run" / "export" / "full" / "README.md").read_text()
    assert f"{evaluation['full']['qx']['bits_per_byte']:.4f} (full) bits per byte" in card
    again = adapt(tmp_path / "run", tmp_path / "raw")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished before") == 21
    # A setting that only the last stage reads repeats that stage and what follows, once its folder is gone.
    refused = adapt(tmp_path / "run", tmp_path / "raw", "--train.stages.1.lr", "5e-4")
    assert refused.returncode == 2
    assert "remove the folder to train it again" in refused.stderr


def _check_export(run):
    export = run / "export" / "full"
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 500
    resized, trained = HFFolder(run / "resized"), HFFolder(export)
    assert set(resized.names) == set(trained.names)
    assert not torch.equal(resized.read("lm_head.weight"), trained.read("lm_head.weight"))


def write_records(recipe, run):
    """Write what a finished run leaves: records, scores, the export of the last stage."""
    write_stage(run.resized / STAGE_FILE, config={}, inputs=[], counts=RESIZED)
    for stage, tokens in (("first", 1000), ("second", 4000)):
        counts = {"steps": 6, "tokens": {"en": tokens, "xx": 3 * tokens}}
        write_stage(run.checkpoints(stage) / STAGE_FILE, config={}, inputs=[], counts=counts)
    bits = {"base": (1.0, 9.0), "resized": (1.0, 4.0), "first": (1.1, 3.0), "second": (1.05, 2.0)}
    evaluation = {
        name: {
            "en": {"bits_per_byte": en, "tokens_per_byte": 0.25},
            "xx": {"bits_per_byte": xx, "tokens_per_byte": 0.5},
        }
        for name, (en, xx) in bits.items()
    }
    write_json(run.root / "evaluation.json", evaluation)
    figures = {"base": {"en": {"tokens_per_byte": 0.25}, "xx": {"tokens_per_byte": 1.0}}}
    write_json(run.root / "tokenizers.json", {**figures, "adapted": {"en": {"tokens_per_byte": 0.25}}})
    export = run.export("second")
    convert_checkpoint(ConvertCheckpoint(source=recipe.work_dir / "megatron", to="hf", output=export))
    return export


RESIZED = {"base_vocab_size": 300, "vocab_size": 1300, "moved_rows": 0, "new_rows": 1000}


def test_the_model_card_of_the_last_export_says_what_the_run_knows(tmp_path, capsys):
    recipe = load(make_run(tmp_path))
    run = RunFolder(recipe.work_dir)
    export = write_records(recipe, run)
    sums = (export / "SHA256SUMS").read_bytes()
    write_results(recipe, run, recipe.base_model)
    card = (export / "README.md").read_text()
    for line in (
        "- xx: 4.0000 (resized) to 2.0000 (second) bits per byte, -50.0 %",
        "- en: 1.0000 (base) to 1.0500 (second) bits per byte, +5.0 %",
        "| tokenizer | continue: 300 to 1,300 tokens |",
        "| rows of new tokens | 1,000, by subtoken_mean |",
        "| tokens of xx | 15,000 (3,000 in first, 12,000 in second) |",
        "| stage second | 1,152 tokens, blend en 0.5, xx 0.5, learns embeddings, lr 0.01 |",
        "| licence | *to be filled in* |",
        '- "xx"',
    ):
        assert line in card.splitlines(), line
    assert f"adapted from {recipe.base_model.name} (en) to xx." in card
    assert str(tmp_path) not in card, "a path of this machine"
    release_model(ReleaseModel(model=export))
    assert (export / "SHA256SUMS").read_bytes() == sums
    assert card.split("## Bits per byte")[1].split("##")[0] in (run.root / "report.md").read_text()


def load(recipe, *flags):
    return load_recipe(["--recipe", str(recipe), *flags])[0]


def test_commands_follow_the_pipeline(tmp_path):
    recipe = load(make_run(tmp_path))
    commands = list(plan_adaptation(recipe, RunFolder(recipe.work_dir), recipe.base_model))
    assert [command.tool for command in commands] == [
        "build_tokenizer", *["preprocess_data"] * 4, "resize_vocab", "convert_checkpoint",
        "pretrain", "convert_checkpoint", "pretrain", "convert_checkpoint",
    ]  # fmt: skip


def test_only_align_is_given_the_documents_of_the_new_language(tmp_path):
    path = make_run(tmp_path)
    for method, is_read in (("subtoken_mean", False), ("align", True)):
        recipe = load(path, "--vocab.method", method)
        build, *_ = plan_vocabulary(recipe, RunFolder(recipe.work_dir), recipe.base_model)
        resize, *_ = plan_training(recipe, RunFolder(recipe.work_dir), recipe.base_model)
        assert resize.config.corpus == (build.config.corpus if is_read else ())


def test_sources_of_a_language_are_made_apart_and_scored_together(tmp_path):
    path = make_run(tmp_path)
    raw = tmp_path / "raw"
    path.write_text(
        path.read_text().replace(f'xx = ["{raw}/xx.jsonl"]', f'"xx/a" = ["{raw}/a.jsonl"]\n"xx/b" = ["{raw}/b.jsonl"]')
    )
    recipe = load(path, "--corpus.xx/b", f"{raw}/c.jsonl")
    run = RunFolder(recipe.work_dir)
    prepared = {item.record.parent: item.config.input for item in plan_corpus(recipe, run)}
    assert prepared == {
        run.root / "corpus" / source: (raw / file,)
        for source, file in (("en", "en.jsonl"), ("xx/a", "a.jsonl"), ("xx/b", "c.jsonl"))
    }
    build, *others = plan_adaptation(recipe, run, recipe.base_model)
    assert build.config.corpus == (run.corpus_part("xx/a", "train"), run.corpus_part("xx/b", "train"))
    prefixes = [item.config.output_prefix for item in others if item.tool == "preprocess_data"]
    assert prefixes == [
        run.root / "tokens" / f"{source}-{part}" for source in ("en", "xx/a", "xx/b") for part in ("train", "valid")
    ]
    evaluate, measure = plan_results(recipe, run, recipe.base_model)
    held_out = [("en", "en"), ("xx", "xx/a"), ("xx", "xx/b")]
    assert evaluate.config.corpora == measure.config.corpora
    assert evaluate.config.corpora == tuple(f"{name}={run.corpus_part(source, 'valid')}" for name, source in held_out)


PAIRS = """
[parallel."xx/pairs"]
languages = ["en", "xx"]
format = "instruction"

[parallel."xx/pairs".instructions]
en-xx = "Translate into xx."
xx-en = "Translate into English."
"""


def write_pairs(folder):
    """A run with a source of pairs beside the text of its language."""
    path = make_run(folder)
    raw = folder / "raw"
    named = f'"xx/text" = ["{raw}/xx.jsonl"]\n"xx/pairs" = ["{raw}/pairs.jsonl"]'
    path.write_text(path.read_text().replace(f'xx = ["{raw}/xx.jsonl"]', named) + PAIRS)
    return path


def find_prefixes(commands):
    return {item.config.output_prefix: item.config for item in commands if item.tool == "preprocess_data"}


def test_pairs_are_a_source_of_their_own_whose_requests_bear_no_loss(tmp_path):
    recipe = load(write_pairs(tmp_path))
    run = RunFolder(recipe.work_dir)
    assert {item.record.parent.name: item.tool for item in plan_corpus(recipe, run)} == {
        "en": "prepare_corpus", "text": "prepare_corpus", "pairs": "prepare_parallel",
    }  # fmt: skip
    build, *others = plan_adaptation(recipe, run, recipe.base_model)
    assert build.config.corpus == (run.corpus_part("xx/text", "train"),)
    keys = {prefix.name: config.settings.prompt_key for prefix, config in find_prefixes(others).items()}
    assert keys == {
        "en-train": "", "en-valid": "", "text-train": "", "text-valid": "", "pairs-train": "prompt",
        "pairs-valid": "prompt",
    }  # fmt: skip
    evaluate, _ = plan_results(recipe, run, recipe.base_model)
    assert not any("xx/pairs" in corpus for corpus in evaluate.config.corpora)


def test_pairs_become_tokens_with_prompts(tmp_path):
    recipe = load(write_pairs(tmp_path))
    run = RunFolder(recipe.work_dir)
    pairs = [{"id": str(at), "en": f"word {at}", "xx": f"drow {at}"} for at in range(300)]
    (tmp_path / "raw" / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prepare = next(item.config for item in plan_corpus(recipe, run) if item.tool == "prepare_parallel")
    prepare_parallel(prepare)
    prefix = run.tokens("xx/pairs", "train")
    config = find_prefixes(plan_adaptation(recipe, run, recipe.base_model))[prefix]
    preprocess_data(replace(config, tokenizer=recipe.base_model))
    file = read_tokens(prefix)
    count = read_prompts(file.prefix, file.num_documents)[0]
    tokenizer = read_tokenizer(recipe.base_model).tokenizer
    ids = file.tokens_N[: file.starts()[1]].tolist()
    assert tokenizer.decode(ids[:count]).strip().startswith("Translate into")
    assert tokenizer.decode(ids[count:]).split()[0] in ("word", "drow")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r'parallel\."xx/pairs"', 'parallel."xx/gone"', r"parallel\.xx/gone: no files; add corpus\.xx/gone"),
        ('"xx/text" = .*', "", r"corpus: no files for 'xx'; add corpus\.xx to the recipe"),
    ],
)
def test_pairs_without_files_or_without_text_beside_them_are_refused(old, new, message, tmp_path, capsys):
    path = write_pairs(tmp_path)
    path.write_text(re.sub(old, new, path.read_text()))
    with pytest.raises(SystemExit):
        load(path)
    assert re.search(message, capsys.readouterr().err)


def test_finished_stage_of_another_plan_is_not_taken_for_this_one(tmp_path):
    path = make_run(tmp_path)
    train_stage(path, "first")
    recipe = load(path)
    commands = [item for item in plan_adaptation(recipe, RunFolder(recipe.work_dir), recipe.base_model) if item.stage]
    run_commands(commands[:1], recipe, ROOT / "tools")
    for file in (tmp_path / "run" / "tokens").glob("en-*"):
        moved = tmp_path / "run" / "tokens" / "en" / file.name.replace("en-", "wiki-")
        moved.parent.mkdir(exist_ok=True)
        shutil.copy(file, moved)
    path.write_text(path.read_text().replace("en = [", '"en/wiki" = ['))
    with pytest.raises(CheckpointError, match=r"\(sources en, xx, now en/wiki, xx\); restore them, or remove"):
        run_commands(commands[:1], load(path), ROOT / "tools")


def test_finished_stage_under_other_settings_is_not_thrown_away(tmp_path):
    path = make_run(tmp_path)
    train_stage(path, "first")
    recipe = load(path, "--train.stages.0.lr", "5e-3")
    commands = [item for item in plan_adaptation(recipe, RunFolder(recipe.work_dir), recipe.base_model) if item.stage]
    with pytest.raises(CheckpointError, match="remove the folder to train it again"):
        run_commands(commands[:1], recipe, ROOT / "tools")
    same = load(path, "--train.log-interval", "7", "--train.nproc-per-node", "2")
    commands = [item for item in plan_adaptation(same, RunFolder(same.work_dir), same.base_model) if item.stage]
    assert commands[0].is_finished()


def test_failing_command_ends_the_run_with_its_exit_code(tmp_path):
    recipe = load(make_run(tmp_path))
    (tmp_path / "broken.py").write_text("raise SystemExit(7)")
    command = Command("broken", recipe.evaluate, tmp_path / "stage.json")
    with pytest.raises(SystemExit) as stopped:
        run_commands([command], recipe, tmp_path)
    assert stopped.value.code == 7

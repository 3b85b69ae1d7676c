"""A stage that begins with the optimizer of another run: behind a stage, and behind new tokens."""

import shutil

import pytest
import torch

from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.root import find_checkpoint
from megatron_adapt.config import ResizeVocab
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import read_json
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.runs import copy_run, encode_documents, make_run, train_stage
from tests.helpers.tiny import write_extended_tokenizer
from tests.train.extended import LETTERS

MOMENT = "optimizer.state.exp_avg.decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The recipe of a run whose first stage is trained; the second trains the same parameters."""
    recipe = make_run(tmp_path_factory.mktemp("first"))
    recipe.write_text(
        recipe.read_text().replace('trainable = "embeddings"', 'trainable = "all"\ncarry_optimizer = true')
    )
    train_stage(recipe, "first")
    return recipe


def read_moment(recipe, stage):
    return DistReader(find_checkpoint(recipe.parent / "run" / "checkpoints" / stage)).read(MOMENT)


def test_a_stage_carries_the_moments_of_the_stage_before(first, tmp_path):
    carried, fresh = (
        copy_run(first, tmp_path / "carried", trained=True),
        copy_run(first, tmp_path / "fresh", trained=True),
    )
    fresh.write_text(fresh.read_text().replace("carry_optimizer = true", ""))
    one_step = ["--train.stop-after-steps", "1"]
    rows = [train_stage(recipe, "second", *one_step) for recipe in (carried, fresh)]
    # The gradient of the first step is the same in both: the moments differ by what the first has carried.
    assert rows[0][0] == rows[1][0]
    assert rows[0][1]["loss"] == rows[1][1]["loss"]
    difference = read_moment(carried, "second") - read_moment(fresh, "second")
    torch.testing.assert_close(difference, 0.9 * read_moment(first, "first"))


def test_a_running_job_adds_tokens_and_goes_on(first, tmp_path):
    recipe, root = copy_run(first, tmp_path / "wider", trained=True), first.parent / "run" / "checkpoints" / "first"
    run = recipe.parent / "run"
    for part in ("megatron", "tokens", "checkpoints"):
        shutil.rmtree(run / part)
    tokenizer = write_extended_tokenizer(root / "hf", tmp_path / "tokenizer", LETTERS)
    resize_vocab(ResizeVocab(model=root, tokenizer=tokenizer, output=run / "megatron", vocab_pad_multiple=128))
    encode_documents(recipe.parent / "raw", tokenizer, run / "tokens")
    text = recipe.read_text()
    start, end = text.index('[[train.stages]]\nname = "first"'), text.index('[[train.stages]]\nname = "second"')
    recipe.write_text(text[:start] + text[end:])
    resized = find_checkpoint(run / "megatron")
    assert not (resized / "plan.json").exists()
    assert "cursors" not in read_json(resized / "training.json")
    rows = train_stage(recipe, "second")
    before = train_stage(first, "first")[-1]["valid_bits_per_byte"]
    assert rows[0]["valid_bits_per_byte"]["en"] == pytest.approx(before["en"], rel=0.02)
    assert rows[-1]["valid_bits_per_byte"]["en"] < before["en"]
    assert rows[-1]["valid_bits_per_byte"]["xx"] < rows[0]["valid_bits_per_byte"]["xx"]


def test_weights_alone_have_nothing_to_carry(tmp_path):
    recipe = make_run(tmp_path)
    recipe.write_text(recipe.read_text().replace('trainable = "all"', 'trainable = "all"\ncarry_optimizer = true'))
    with pytest.raises(CheckpointError, match=r"stages first: carry_optimizer: .*release holds weights alone; leave"):
        train_stage(recipe, "first")


def test_an_optimizer_of_other_parameters_is_refused(first, tmp_path):
    recipe = copy_run(first, tmp_path / "other", trained=True)
    recipe.write_text(recipe.read_text().replace('"all"\ncarry', '"embeddings"\ncarry'))
    with pytest.raises(
        CheckpointError, match="trained with trainable all, now it is embeddings; its optimizer does not"
    ):
        train_stage(recipe, "second")

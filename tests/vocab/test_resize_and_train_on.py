"""A run goes on behind a resize with its optimizer: for text of the old vocabulary nothing happens but the softmax.

Ten steps at tensor parallelism 2, a checkpoint, then three ways on over the same ten batches: undisturbed; resized by
512 rows with masters and moments, on one rank; resized with the weights alone, as a new optimizer would have it.
"""

import json
import logging
import math
import shutil
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.root import HF_FOLDER, find_checkpoint, read_description
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import (
    CheckpointSettings,
    ConvertCheckpoint,
    Layout,
    ResizeVocab,
    StageSettings,
    TrainSettings,
)
from megatron_adapt.data.plan import BlendPosition, make_plan
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.state import load_state, save_state
from megatron_adapt.train.step import train_step
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.runs import make_texts
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama

_logger = logging.getLogger(__name__)
BASE, NEW, STEPS, BATCH, LENGTH = 300, 512, 10, 12, 32
FIRST_STEPS = 150
"Of the base model, so that it knows what the text never has."
WORDS = "the cat saw a dog on hill".split()
CAPITALS = tuple(islice(product(ascii_uppercase, repeat=2), NEW))
"New tokens of letters that the text never has, as those of another script are."
STAGE = StageSettings(name="s", tokens=1, blend={"en": 1.0}, lr=1e-2, min_lr=1e-3, lr_warmup_fraction=0.1)
PLAN = make_plan({"en": 1.0}, 64, {"en": 999}, seq_length=LENGTH, global_batch_size=BATCH, seed=1)
POSITION = BlendPosition(PLAN, (0,), {"en": "data"})
MATRICES = ("embedding.word_embeddings.weight", "output_layer.weight")


def make_windows(tokenizer):
    """Windows of the base model's training and of the 20 steps, [steps, batch, length + 1]."""
    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = [at for text in make_texts(WORDS, 2000, seed=3) for at in reader.encode(text, add_special_tokens=True).ids]
    shape = (FIRST_STEPS + 2 * STEPS, BATCH, LENGTH + 1)
    windows = np.array(ids[: math.prod(shape)]).reshape(shape)
    return windows[:FIRST_STEPS], windows[FIRST_STEPS:]


def build(description, layout, bf16, num_steps=2 * STEPS):
    model = build_model(
        description.shape,
        padded_vocab_size=description.padded_vocab_size,
        layout=layout,
        seq_length=LENGTH,
        bf16=bf16,
    )
    return build_trainer([model], TrainSettings(bf16=bf16), STAGE, num_steps)


def run_steps(trainer, windows):
    return [train_step(trainer, batch, 6).loss for batch in windows]


def train_base(initial, root, windows):
    """Train from random weights on one rank."""
    description = read_description(initial)
    with start_engine(Layout(), seed=1):
        trainer = build(description, Layout(), bf16=False, num_steps=FIRST_STEPS)
        load_weights(trainer.bare_models, initial)
        trainer.optimizer.reload_model_params()
        run_steps(trainer, windows)
        save_state(root, trainer, replace(description, step=FIRST_STEPS), {}, POSITION)


def train_undisturbed(initial, root, windows, bf16):
    """Train all steps on two ranks, saving in the middle; return the losses."""
    description, layout = read_description(initial), Layout(tensor_model_parallel_size=2)
    with start_engine(layout, seed=1):
        trainer = build(description, layout, bf16)
        load_weights(trainer.bare_models, initial)
        trainer.optimizer.reload_model_params()
        first = run_steps(trainer, windows[:STEPS])
        dtype = "bfloat16" if bf16 else "float32"
        save_state(root, trainer, replace(description, step=STEPS, dtype=dtype), {}, POSITION)
        return first + run_steps(trainer, windows[STEPS:])


def train_on(root, windows, bf16, *, with_optimizer):
    """Go on from a resized checkpoint on one rank; return the losses. What was loaded is saved again first."""
    folder = find_checkpoint(root)
    description = read_description(folder)
    with start_engine(Layout(), seed=2):
        trainer = build(description, Layout(), bf16)
        if with_optimizer:
            assert load_state(root, trainer, {}) == STEPS
            save_state(root.with_name("again"), trainer, description, {}, POSITION)
        else:
            load_weights(trainer.bare_models, folder)
            trainer.optimizer.reload_model_params()
            trainer.schedule.step(increment=STEPS)
        return run_steps(trainer, windows[STEPS:])


@dataclass(frozen=True)
class Curves:
    """Losses of the three ways on, behind the same ten steps, and what the way with the optimizer began from."""

    folder: Path
    bf16: bool
    batch: np.ndarray
    undisturbed: np.ndarray
    resized: np.ndarray
    restarted: np.ndarray

    @property
    def rounding(self):
        """Difference of a loss between two layouts."""
        return 4e-3 if self.bf16 else 2e-5


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
def curves(request, tmp_path_factory):
    folder, bf16 = tmp_path_factory.mktemp("run"), request.param
    hf = write_llama(folder / "base", vocab_size=BASE)
    tokenizer = write_extended_tokenizer(write_byte_tokenizer(folder / "old", BASE), folder / "new", CAPITALS)
    settings = CheckpointSettings(vocab_pad_multiple=128)
    convert_checkpoint(ConvertCheckpoint(source=hf, to="megatron", output=folder / "initial", settings=settings))
    first, windows = make_windows(hf)
    train_base(folder / "initial" / "release", folder / "first", first)
    old = folder / "trained"
    losses = run_ranks(train_undisturbed, 2, find_checkpoint(folder / "first"), old, windows, bf16)[0]
    shutil.copytree(folder / "initial" / HF_FOLDER, old / HF_FOLDER)
    resize_vocab(ResizeVocab(model=old, tokenizer=tokenizer, output=folder / "resized", vocab_pad_multiple=128))
    resized = train_on(folder / "resized", windows, bf16, with_optimizer=True)
    restarted = train_on(folder / "resized", windows, bf16, with_optimizer=False)
    found = Curves(folder, bf16, windows[STEPS], *(np.array(x) for x in (losses[STEPS:], resized, restarted)))
    _logger.info("undisturbed %s", np.round(losses, 4))
    _logger.info("resized     %s", np.round(found.resized, 4))
    _logger.info("restarted   %s", np.round(found.restarted, 4))
    return found


def score(root, output, batch):
    """Return log-probabilities of a checkpoint by transformers, in fp32: [tokens, vocabulary]."""
    convert_checkpoint(ConvertCheckpoint(source=root, to="hf", output=output))
    model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(batch[:, :-1])).logits.log_softmax(-1).flatten(0, 1).double()


@pytest.fixture(scope="module")
def bound(curves):
    """Most that the loss of the next batch can rise, from the old model alone.

    The row of a new token is the mean of its pieces' rows, so is its logit, and exp is convex: its share of the softmax
    is at most the mean of its pieces' shares.
    """
    before = score(curves.folder / "trained", curves.folder / "trained_hf", curves.batch)
    uses = torch.zeros(BASE, dtype=torch.float64)
    for olds in json.loads((curves.folder / "new" / "added_pieces.json").read_text())["pieces"].values():
        uses += torch.bincount(torch.tensor(olds), minlength=BASE) / len(olds)
    return float(torch.log1p(before.exp() @ uses).mean())


def test_the_first_loss_rises_by_the_mass_of_the_new_tokens_and_by_nothing_else(curves, bound):
    after = score(curves.folder / "resized", curves.folder / "resized_hf", curves.batch)
    mass = after[:, BASE:].exp().sum(-1)
    expected = float(-torch.log1p(-mass).mean())
    rise = float(curves.resized[0] - curves.undisturbed[0])
    _logger.info("rise %.6f, by the new tokens' mass %.6f, at most %.6f", rise, expected, bound)
    assert rise == pytest.approx(expected, abs=curves.rounding)
    assert 0 < expected < bound


def test_the_curve_goes_on_without_a_jump(curves, bound):
    """No step strays farther than twice what the first may; without the optimizer some does, so the test can fail."""
    gap, restarted = (abs(way - curves.undisturbed) for way in (curves.resized, curves.restarted))
    _logger.info("with optimizer    %s", np.round(gap, 5))
    _logger.info("without optimizer %s", np.round(restarted, 5))
    most = 2 * bound + curves.rounding
    assert gap.max() < most
    assert restarted[0] == pytest.approx(gap[0], abs=curves.rounding)
    assert restarted.max() > 3 * most


def test_masters_and_moments_are_those_of_the_same_ids_and_are_what_is_trained_on(curves):
    before, after, loaded = (
        DistReader(find_checkpoint(curves.folder / name)) for name in ("trained", "resized", "again")
    )
    states = [f"optimizer.state.{state}." for state in ("param", "exp_avg", "exp_avg_sq")]
    for matrix in MATRICES:
        for state in states:
            old, new = before.read(state + matrix), after.read(state + matrix)
            assert old.dtype == new.dtype == torch.float32
            assert torch.equal(new[:BASE], old[:BASE]), state + matrix
            assert old[:BASE].any()
            assert new[BASE : BASE + NEW].any(-1).all() == (state == states[0]), "moments of new rows are zero"
    for key in after.keys:
        assert torch.equal(loaded.read(key), after.read(key)), key

"""Token distillation on a model that was trained: what it does to bits per byte of both languages.

A base is trained on two languages cut by its own tokenizer, gets rows for the letters and words of the second one by
subtoken_mean, and distils them. Both languages are chains of words, each followed by one of three.
"""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

from megatron_adapt.checkpoint.convert import convert_checkpoint
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
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.tokenizer.id_map import read_id_map
from megatron_adapt.tokenizer.pieces import piece_bytes, read_tokenizer
from megatron_adapt.train.distill import spell_new_tokens
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.state import save_state
from megatron_adapt.train.step import measure_bits_per_byte, train_step
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama

_logger = logging.getLogger(__name__)
T, BATCH, BASE_STEPS, STEPS, PADDED = 48, 16, 300, 75, 384
LETTERS = "აბგდევზთიკლმნოპჟრსტუ"
WORDS = {
    "en": "the cat saw a dog on hill and ran home to eat fish with milk by fire".split(),
    "xx": ["".join(np.random.default_rng(seed).choice(list(LETTERS), 2 + seed % 2)) for seed in range(16)],
}
PLAN = make_plan({"en": 1.0}, 64, {"en": 999}, seq_length=T, global_batch_size=BATCH, seed=1)
BASE = StageSettings(name="s", tokens=1, blend={"en": 1.0}, lr=3e-3, min_lr=3e-4, lr_warmup_fraction=0.1)
DISTIL = replace(BASE, trainable="new_rows", objective="token_distillation")


def make_windows(tokenizer, language, num_windows, seed):
    words, draw = WORDS[language], np.random.default_rng(seed)
    follow = [np.random.default_rng(at).permutation(len(words))[:3] for at in range(len(words))]
    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids, at = [], 0
    while len(ids) < num_windows * (T + 1):
        text = []
        for _ in range(draw.integers(5, 40)):
            at = draw.choice(follow[at], p=[0.6, 0.3, 0.1])
            text.append(words[at])
        ids += reader.encode(" ".join(text), add_special_tokens=True).ids
    return np.array(ids[: num_windows * (T + 1)]).reshape(num_windows, T + 1)


def list_merges():
    """Merge the bytes of letters, then the letters of words of the second language."""
    level, merges = pre_tokenizers.ByteLevel(add_prefix_space=False), {}

    def merge(left, right):
        merges[left + right] = (left, right)
        return left + right

    for word in WORDS["xx"]:
        letters = [level.pre_tokenize_str(letter)[0][0] for letter in word]
        joined = [merge(merge(first, second), third) for first, second, third in letters]
        for letter in joined[1:]:
            joined[0] = merge(joined[0], letter)
    return list(merges.values())


def build(description, stage, num_steps, new_ids=None):
    model = build_model(
        description.shape, padded_vocab_size=PADDED, layout=Layout(), seq_length=T, bf16=False
    )  # fmt: skip
    freeze_rest(model, stage.trainable, head=stage.objective == "language_modeling")
    return build_trainer([model], TrainSettings(bf16=False), stage, num_steps, new_ids)


def measure(trainer, tokenizer, language):
    sizes = [len(piece) for piece in piece_bytes(read_tokenizer(tokenizer))]
    bytes_V = torch.tensor(sizes + [0] * (PADDED - len(sizes)))
    return measure_bits_per_byte(trainer.models, make_windows(tokenizer, language, 64, seed=99), bytes_V, 16)


def train_base(initial, root, tokenizer):
    description = read_description(initial)
    halves = [make_windows(tokenizer, language, BASE_STEPS * BATCH // 2, seed=7) for language in WORDS]
    batches = np.concatenate([half.reshape(BASE_STEPS, -1, T + 1) for half in halves], axis=1)
    with start_engine(Layout(), seed=1):
        trainer = build(description, BASE, BASE_STEPS)
        load_weights(trainer.bare_models, initial)
        trainer.optimizer.reload_model_params()
        for batch in batches:
            train_step(trainer, batch, BATCH)
        state = replace(description, step=BASE_STEPS)
        save_state(root, trainer, state, {}, BlendPosition(PLAN, (0,), {"en": "data"}))
        return {language: measure(trainer, tokenizer, language) for language in WORDS}


@pytest.mark.slow
def test_distilled_rows_read_the_new_language_better_than_subtoken_mean_and_the_old_one_alike(tmp_path):
    hf = write_llama(
        tmp_path / "hf", hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_key_value_heads=4
    )  # fmt: skip
    old = write_byte_tokenizer(tmp_path / "old", 300)
    new = write_extended_tokenizer(old, tmp_path / "new", list_merges())
    settings = CheckpointSettings(vocab_pad_multiple=PADDED)
    convert_checkpoint(ConvertCheckpoint(source=hf, to="megatron", output=tmp_path / "initial", settings=settings))
    base = train_base(find_checkpoint(tmp_path / "initial"), tmp_path / "trained", old)
    shutil.copytree(tmp_path / "initial" / HF_FOLDER, tmp_path / "trained" / HF_FOLDER)
    resize = ResizeVocab(
        model=tmp_path / "trained", tokenizer=new, output=tmp_path / "resized", vocab_pad_multiple=PADDED
    )
    resize_vocab(resize)
    id_map = read_id_map(read_tokenizer(new))
    distillation = spell_new_tokens(id_map, layer=-1, max_positions=128)
    folder = find_checkpoint(tmp_path / "resized")
    with start_engine(Layout(), seed=1):
        trainer = build(read_description(folder), DISTIL, STEPS, np.array(list(id_map.pieces)))
        load_weights(trainer.bare_models, folder)
        trainer.optimizer.reload_model_params()
        before = {language: measure(trainer, new, language) for language in WORDS}
        windows = make_windows(new, "xx", STEPS * BATCH, seed=7).reshape(STEPS, BATCH, T + 1)
        losses = [train_step(trainer, batch, BATCH, distillation=distillation).loss for batch in windows]
        after = {language: measure(trainer, new, language) for language in WORDS}
    _logger.info("bits per byte: base %s, subtoken_mean %s, distilled %s", base, before, after)
    _logger.info("squared error %.4f to %.4f", losses[0], losses[-1])
    assert losses[-1] < 0.6 * losses[0]
    assert base["xx"] < after["xx"] < 0.7 * before["xx"]
    assert after["en"] == before["en"], "no row that the old language reads has moved"

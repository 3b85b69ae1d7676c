"""Where documents begin in a window, which targets bear loss, and the refusal of data that cannot tell."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.config import DataSettings, PreprocessData, TrainSettings
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.errors import ConfigError
from megatron_adapt.flags import load_recipe
from megatron_adapt.train.documents import find_documents, find_eod, mask_eod
from megatron_adapt.train.inputs import open_inputs
from tests.helpers.runs import make_run, train_stage, write_documents
from tests.helpers.tiny import write_byte_tokenizer

EOD = 1


def test_documents_of_windows_counted_by_hand():
    ids_BT = np.array(
        [
            [7, 7, EOD, 8, EOD],  # the end of one document, then a whole one
            [EOD, EOD, 9, 9, 9],  # the EOD of a document that began before, one of EOD alone, the begin of a third
        ]
    )
    assert find_documents(ids_BT, EOD).tolist() == [0, 3, 5, 6, 7, 10]


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4))
def test_documents_do_not_cross_windows_and_end_with_their_only_eod(rows):
    ids_BT = np.array(rows)
    cu_seqlens = find_documents(ids_BT, EOD)
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == ids_BT.size
    assert set(range(0, ids_BT.size, 6)) <= set(cu_seqlens.tolist())
    documents = np.split(ids_BT.flatten(), cu_seqlens[1:-1])
    for document, end in zip(documents, cu_seqlens[1:], strict=True):
        assert len(document) > 0
        assert EOD not in document[:-1]
        assert document[-1] == EOD or end % 6 == 0


def test_loss_leaves_out_what_is_predicted_from_eod_and_counts_the_rest():
    windows = np.array([[EOD, 5, 6, EOD, 7], [5, EOD, EOD, 8, EOD], [5, 6, 7, 8, 9]])
    mask_NT = mask_eod(windows, EOD)
    assert mask_NT.tolist() == [[False, True, True, False], [True, False, False, True], [True, True, True, True]]
    assert mask_NT.sum() == 8


# ---------------------------------------------------------------- data that can tell, and data that cannot


@pytest.fixture
def tokenizer(tmp_path):
    return write_byte_tokenizer(tmp_path / "tokenizer")


def make_prefix(tmp_path, tokenizer, *, append_eod):
    prefix = tmp_path / f"eod-{append_eod}"
    settings = DataSettings(append_eod=append_eod)
    raw = write_documents(tmp_path / "raw.jsonl", ["one", "two"])
    preprocess_data(PreprocessData(input=(raw,), tokenizer=tokenizer, output_prefix=prefix, settings=settings))
    return prefix


@pytest.mark.parametrize("setting", ["reset_attention_mask", "eod_mask_loss"])
def test_eod_is_that_of_the_checkpoint_and_of_all_token_files(setting, tmp_path, tokenizer):
    train = TrainSettings(**{setting: True})
    ends, ends_not = (make_prefix(tmp_path, tokenizer, append_eod=append_eod) for append_eod in (True, False))
    assert find_eod(train, [ends, ends], tokenizer) == EOD
    assert find_eod(TrainSettings(), [ends, ends_not], tokenizer) is None
    message = rf"train.{setting}: .*eod-False.stage.json says no end-of-document token, .* 1; tokenise again with data"
    with pytest.raises(ConfigError, match=message):
        find_eod(train, [ends, ends_not], tokenizer)


def test_eod_of_another_name_than_the_data_were_written_with_is_refused(tmp_path, tokenizer):
    prefix = make_prefix(tmp_path, tokenizer, append_eod=True)
    config = tokenizer / "tokenizer_config.json"
    described = json.loads(config.read_text())
    config.write_text(json.dumps({**described, "eos_token": "<s>"}))
    train = TrainSettings(reset_attention_mask=True)
    with pytest.raises(ConfigError, match="says 1 at the end of documents, the tokenizer 0; tokenise again"):
        find_eod(train, [prefix], tokenizer)
    del described["eos_token"]
    config.write_text(json.dumps(described))
    content = tokenizer / "tokenizer.json"
    content.write_text(content.read_text().replace("</s>", "<end>"))
    with pytest.raises(ConfigError, match=r"train.reset_attention_mask: .* has no end-of-document token \(eos_token\)"):
        find_eod(train, [prefix], tokenizer)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_stage_on_documents_without_eod_is_refused_before_the_engine_starts(part, tmp_path):
    recipe = make_run(tmp_path)
    flags = ["--recipe", str(recipe), "--stage", "first", "--train.reset-attention-mask"]
    assert open_inputs(*load_recipe(flags, stage=True)).eod_id == EOD
    path = tmp_path / "run" / "tokens" / f"xx-{part}.stage.json"
    record = json.loads(path.read_text())
    record["config"]["settings"]["append_eod"] = False
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=rf"train.reset_attention_mask: .*xx-{part}.stage.json says no end-of"):
        open_inputs(*load_recipe(flags, stage=True))


def test_settings_reach_training_and_only_attention_reaches_validation(tmp_path):
    # Windows long enough for several documents to end in the first batch.
    flags = ("--train.seq-length", "64", "--train.stop-after-steps", "1")
    plain, masked, reset = (
        train_stage(make_run(tmp_path / flag), "first", f"--train.{flag}", *flags)
        for flag in ("no-eod-mask-loss", "eod-mask-loss", "reset-attention-mask")
    )
    assert masked[0]["valid_bits_per_byte"] == plain[0]["valid_bits_per_byte"]
    assert masked[1]["loss"] != pytest.approx(plain[1]["loss"], rel=1e-3)
    assert reset[0]["valid_bits_per_byte"] != pytest.approx(plain[0]["valid_bits_per_byte"], rel=1e-3)
    assert reset[1]["loss"] != pytest.approx(plain[1]["loss"], rel=1e-4)

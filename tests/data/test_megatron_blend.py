"""megatron-core's builder on the project's files: the same documents, in its own order."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_adapt.data.megatron_blend import MegatronWindows
from megatron_adapt.data.plan import make_plan
from megatron_adapt.errors import ConfigError
from tests.data.token_files import count_up, make_tokens

_T = 10


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    return {"ja": make_tokens(folder / "ja", count_up(0, 501)), "en": make_tokens(folder / "en", count_up(600, 301))}


def open_windows(prefixes, cache, shares=None, **changes):
    sizes = {"seq_length": _T, "global_batch_size": 8, "seed": 3}
    plan = make_plan(shares or {"ja": 0.75, "en": 0.25}, 400, {"ja": 501, "en": 301}, **sizes, **changes)
    return MegatronWindows(plan, prefixes, cache)


def test_windows_are_text_of_their_sources_in_the_shares_of_the_plan(prefixes, tmp_path):
    windows = open_windows(prefixes, tmp_path)
    ids_NT1, sources_N, _ = windows.read_windows(0, len(windows))
    assert ids_NT1.shape == (40, _T + 1)
    assert ((ids_NT1 >= 600) == (sources_N == 1)[:, None]).all()
    assert windows.count_before(40).tolist() == [30, 10]
    for place in range(41):
        assert windows.count_before(place).tolist() == np.bincount(sources_N[:place], minlength=2).tolist()
    # Documents are 7 tokens; inside one, ids count up.
    steps_NT = np.diff(ids_NT1, axis=1)
    assert (steps_NT == 1).mean() > 0.8


def test_the_order_is_that_of_the_builder_called_directly(prefixes, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 1000, 0, -1, {}

    config = GPTDatasetConfig(
        random_seed=3, sequence_length=_T, blend=([str(prefixes["ja"]), str(prefixes["en"])], [30.0, 10.0]),
        split="1,0,0", tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [40, 0, 0], lambda: True, config).build()[0]
    ids_NT1, _, _ = open_windows(prefixes, tmp_path).read_windows(0, 40)
    assert [dataset[place]["tokens"].tolist() for place in range(40)] == ids_NT1[:, :-1].tolist()
    assert [dataset[place]["labels"].tolist() for place in range(40)] == ids_NT1[:, 1:].tolist()


def test_any_part_of_the_order_can_be_read_alone(prefixes, tmp_path):
    whole, sources, _ = open_windows(prefixes, tmp_path).read_windows(0, 40)
    ids, found, _ = open_windows(prefixes, tmp_path).read_windows(16, 8)
    np.testing.assert_array_equal(ids, whole[16:24])
    np.testing.assert_array_equal(found, sources[16:24])


def test_a_source_without_windows_is_left_out(prefixes, tmp_path):
    windows = open_windows(prefixes, tmp_path, shares={"ja": 0.001, "en": 0.999})
    assert windows.plan.windows == (0, 40)
    ids_NT1, sources_N, _ = windows.read_windows(0, 40)
    assert (sources_N == 1).all()
    assert (ids_NT1 >= 600).all()


def test_a_stage_that_begins_where_another_stopped_is_refused(prefixes, tmp_path):
    with pytest.raises(ConfigError, match="megatron begins every source anew, and en was read by the stages before"):
        open_windows(prefixes, tmp_path, first={"en": 4})


def test_megatron_core_reads_every_document_of_the_files(prefixes):
    dataset = IndexedDataset(str(prefixes["en"]))
    assert [dataset[at].tolist() for at in range(len(dataset))] == [ids.tolist() for ids in count_up(600, 301)]

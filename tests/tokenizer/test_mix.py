import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.mix import read_mix
from tests.tokenizer.bases import write_corpus


def make_config(folder, new, old, share=0.5):
    written = [write_corpus(folder / f"{name}.jsonl", texts) for name, texts in (("new", new), ("old", old))]
    made = TokenizerSettings(method="replace", old_share=share)
    return BuildTokenizer(
        base=folder, corpus=(written[0],), old_corpus=(written[1],), output=folder / "out", settings=made
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9]),
)
def test_the_shares_are_met_as_nearly_as_whole_documents_can(tmp_path, new_sizes, old_sizes, share):
    new, old = ["n" * size for size in new_sizes], ["o" * size for size in old_sizes]
    mix = list(read_mix(make_config(tmp_path, new, old, share)))
    taken = [[text for text in mix if text[0] == letter] for letter in "no"]
    total = min(sum(new_sizes) / (1 - share), sum(old_sizes) / share)
    for texts, found, part in ((new, taken[0], 1 - share), (old, taken[1], share)):
        assert abs(sum(map(len, found)) - part * total) <= max(map(len, texts)) / 2 + 1e-6
        rest = iter(texts)
        assert all(text in rest for text in found)  # in the old order, none twice
    # The scarce one is read whole.
    assert taken[0] == new or taken[1] == old
    assert mix == [*taken[0], *taken[1]] == list(read_mix(make_config(tmp_path, new, old, share)))


def test_documents_of_the_large_corpus_are_taken_from_all_over(tmp_path):
    new, old = ["n" * 10] * 10, [f"{at:010}" for at in range(100)]
    places = [int(text) for text in read_mix(make_config(tmp_path, new, old)) if text.isdecimal()]
    assert len(places) == 10
    assert {place // 10 for place in places} == set(range(10))


def test_a_share_of_nothing_or_of_all_reads_one_corpus(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert list(read_mix(make_config(tmp_path, ["new"], ["old"], 0.0))) == ["new"]
    assert "--corpus: counting 0.0 of 0.0 MB" in caplog.text
    assert "--old-corpus" not in caplog.text
    assert list(read_mix(make_config(tmp_path, ["new"], ["old"], 1.0))) == ["old"]


def test_a_missing_or_an_empty_corpus_is_refused(tmp_path):
    config = make_config(tmp_path, ["new"], ["old"])
    alone = BuildTokenizer(base=tmp_path, corpus=config.corpus, output=config.output, settings=config.settings)
    with pytest.raises(ConfigError, match="--old-corpus: missing; method replace counts the old language too"):
        list(read_mix(alone))
    for new, old, flag in (([""], ["old"], "--corpus"), (["new"], [""], "--old-corpus")):
        with pytest.raises(DataError, match=rf"^{flag}: .* hold no text"):
            list(read_mix(make_config(tmp_path, new, old)))

"""What the settings of the stage refuse."""

from pathlib import Path

import pytest

from megatron_adapt.config import ResizeVocab, VocabSettings
from megatron_adapt.errors import ConfigError

PATHS = {"model": Path("m"), "tokenizer": Path("t"), "output": Path("o")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "linear_transform"},
            "vocab.donor: missing; name the folder of the model whose rows linear_transform reads",
        ),
        (
            {"donor": Path("d")},
            "vocab.donor: d has no effect with method subtoken_mean; leave it out, or use linear_transform or clp",
        ),
        ({"method": "mean", "estimator": "ols"}, "vocab.estimator: ols has no effect with method mean"),
        ({"piece_weights": "position"}, "vocab.piece_weights: position has no effect .*, or use subtoken_weighted"),
        (
            {"method": "align", "seed": 3},
            "vocab.seed: 3 has no effect .* use normal or linear_transform or similarity_topk or focus",
        ),
        ({"method": "omp"}, "vocab.donor: missing; name the folder of the model whose rows omp reads"),
        (
            {"method": "similarity_topk", "encoder": "e", "vectors": Path("v")},
            "encoder: e and vectors v are two sources",
        ),
        (
            {"method": "similarity_topk", "base_vectors": Path("b")},
            "base_vectors: b needs vectors to align with and a d",
        ),
        ({"method": "similarity_topk", "dictionary": Path("d")}, "dictionary: d has no effect without base_vectors"),
        (
            {"method": "similarity_topk", "encoder": "e", "seed": 3},
            "vocab.seed: 3 has no effect on vectors that are not",
        ),
        ({"method": "similarity_topk", "temperature": 0.0}, "vocab.temperature: 0.0 is not positive; 0.1 is usual"),
        ({"method": "similarity_topk", "num_neighbors": 0}, "vocab.num_neighbors: 0 is below 1; use 1 or more"),
        ({"method": "focus", "num_neighbors": 3}, "num_neighbors: 3 has no effect with method focus; leave it out"),
        ({"method": "normal", "seed": -1}, "vocab.seed: -1 is below 0; use 0 or more"),
    ],
)
def test_settings_that_lack_something_or_change_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        VocabSettings(**settings)


def test_align_needs_a_corpus_and_nothing_else_takes_one():
    with pytest.raises(ConfigError, match="corpus: missing; name documents in the new language for method align"):
        ResizeVocab(**PATHS, settings=VocabSettings(method="align"))
    with pytest.raises(ConfigError, match="corpus: has no effect with method subtoken_mean as it is set; leave it out"):
        ResizeVocab(**PATHS, corpus=(Path("c"),))


def test_what_a_method_reads_is_listed():
    align = ResizeVocab(**PATHS, corpus=(Path("c"),), settings=VocabSettings(method="align"))
    mapped = ResizeVocab(**PATHS, settings=VocabSettings(method="linear_transform", donor=Path("d")))
    assert align.list_sources() == [Path("c")]
    assert mapped.list_sources() == [Path("d")]
    assert ResizeVocab(**PATHS).list_sources() == []

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.corpus import duplicates
from megatron_adapt.corpus.duplicates import NUM_BINS, NearDuplicates, choose_bands, sign_text, sign_twin

needs_csrc = pytest.mark.skipif(duplicates._csrc is None, reason="the C++ extension is not built")


def make_text(seed, num_words=400):
    random_words = random.Random(seed)
    return " ".join("".join(random_words.choices("abcdefghij", k=random_words.randint(3, 9))) for _ in range(num_words))


def list_runs(text):
    text = text.replace(" ", "")
    return {text[at : at + 13] for at in range(len(text) - 12)}


@needs_csrc
@settings(deadline=None, max_examples=40)
@given(st.text(max_size=80), st.integers(1, 14), st.sampled_from([1, 7, 128]))
def test_the_compiled_signature_equals_the_twin(text, run, num_bins):
    code_points = text.encode("utf-32-le", "surrogatepass")
    compiled = duplicates._csrc.sign_text(code_points, run, num_bins)
    assert np.array_equal(compiled, sign_twin(code_points, run, num_bins))


@pytest.mark.parametrize("shared", [0.3, 0.6, 0.9])
def test_equal_bins_estimate_the_resemblance(shared):
    errors = []
    for seed in range(30):
        common, left, right = (make_text(f"{seed}-{part}", 600) for part in ("common", "left", "right"))
        cut = round(len(common) * shared)
        one, other = common[:cut] + left[cut:], common[:cut] + right[cut:]
        sets = [
            {text[at : at + 13] for at in range(len(text) - 12)}
            for text in (one.replace(" ", ""), other.replace(" ", ""))
        ]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        errors.append(float((sign_text(one) == sign_text(other)).mean()) - exact)
    assert abs(np.mean(errors)) < 0.03
    # The deviation of a share of 128 independent bins is at most 0.044.
    assert np.std(errors) < 0.07


def test_case_spaces_and_punctuation_do_not_count():
    text = make_text(1)
    assert np.array_equal(sign_text(text), sign_text(text.upper().replace(" ", ",\n ") + "..."))


def test_near_duplicates_are_found_and_others_kept():
    pages = [make_text(seed) for seed in range(60)]
    near = NearDuplicates(0.8)
    assert all(near.add(page) for page in pages)
    assert not any(near.add(page + " and a new last line") for page in pages)
    halves = [page[: len(page) // 2] + make_text(f"new{seed}", 200) for seed, page in enumerate(pages)]
    assert sum(near.add(page) for page in halves) >= 57


def test_texts_shorter_than_a_run_are_compared_whole():
    near = NearDuplicates(0.8)
    assert near.add("short")
    assert not near.add("Short!")
    assert near.add("shore")


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_pairs_around_the_threshold(threshold):
    num_bands, num_rows = choose_bands(threshold)
    assert num_bands * num_rows <= NUM_BINS

    def chance(similarity):
        return 1 - (1 - similarity**num_rows) ** num_bands

    assert chance(threshold - 0.2) < 0.2
    assert chance(min(0.99, threshold + 0.15)) > 0.8

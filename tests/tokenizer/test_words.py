from collections import Counter
from itertools import pairwise

import pytest

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.merges import learn_merges
from megatron_adapt.tokenizer.pieces import copy_tokenizer, from_letters, read_tokenizer, to_letters
from megatron_adapt.tokenizer.words import count_words, segment_words, strip_tokenizer
from tests.tokenizer.bases import ODD_TEXTS, edit_json, make_texts


def list_words(segmented):
    bounds = pairwise(segmented.offsets.tolist())
    return [[segmented.symbols[index] for index in segmented.ids[start:end]] for start, end in bounds]


def test_words_are_counted_with_their_space(bases):
    counted = count_words(bases["sentencepiece"], ["кот и кот", "кот\nкот 12"], make_filter(("Cyrillic",)))
    assert counted.counts == {"▁кот": 3, "▁и": 1, "кот": 1}
    assert (counted.num_texts, counted.num_bytes) == (2, 32)
    counted = count_words(bases["byte_level"], ["кот и кот", "кот\nкот 12"], make_filter(("Cyrillic",)))
    spelled = {from_letters(word).decode(): count for word, count in counted.counts.items()}
    assert spelled == {"кот": 3, " кот": 1, " и": 1}


def test_words_without_the_script_are_dropped(base):
    counted = count_words(base, make_texts("en", 20), make_filter(("Cyrillic",)))
    assert not counted.counts
    assert counted.num_texts == 20


def test_the_sample_is_spread_over_the_corpus(base):
    texts = [f"{number} " + "x" * 9000 for number in range(3000)]
    sample = count_words(base, texts, make_filter(())).sample
    assert 256 <= len(sample) < 512
    assert max(map(len, sample)) == 4096
    numbers = [int(text.split()[0]) for text in sample]
    assert numbers == list(range(0, 3000, numbers[1]))


def test_symbols_spell_the_words(base):
    counts = count_words(base, [*ODD_TEXTS, *make_texts("ja", 5), *make_texts("en", 5)], make_filter(())).counts
    segmented = segment_words(base, counts)
    spell = from_letters if base.kind == "byte_level" else str.encode
    # Behind the words stand the missing characters that a piece would save several tokens for.
    assert segmented.counts.tolist()[: len(counts)] == list(counts.values())
    spelled = [b"".join(word).replace(b"\xff", b"") for word in list_words(segmented)]
    assert spelled[: len(counts)] == [spell(word) for word in counts]
    assert all(len(data.decode()) == 1 and len(data) > 2 for data in spelled[len(counts) :])


def test_words_are_cut_by_the_base_merges(base):
    words = ["the", "inter", "verting"]
    segmented = segment_words(base, Counter(words))
    expected = [base.tokenizer.model.tokenize(word) for word in words]
    assert list_words(segmented) == [[token.value.encode() for token in tokens] for tokens in expected]


def test_a_missing_character_is_its_first_byte_and_the_rest(bases):
    segmented = segment_words(bases["sentencepiece"], Counter(["▁日e\x01", "a é"]))
    assert list_words(segmented)[0] == ["▁".encode(), b"\xe6", b"\x97\xa5", b"e", b"\xff", b"\x01\xff"]
    assert list_words(segmented)[1][-2:] == [b"\xc3", b"\xa9"]


def test_a_missing_character_counts_for_every_token_it_saves(bases):
    counts = Counter({"▁日": 5, "日é😀": 2, "ж": 9, "本": 1})
    segmented = segment_words(bases["sentencepiece"], counts)
    added = list(zip(list_words(segmented), segmented.counts.tolist(), strict=True))[len(counts) :]
    # Three bytes save two tokens where a merge of two pieces saves one, four bytes save three; once is rare.
    assert added == [([b"\xe6", b"\x97\xa5"], 7), ([b"\xf0", "😀".encode()[1:]], 4)]
    assert [piece for piece, _ in learn_merges(segmented, 3, 2, lambda piece: True)] == [
        "日".encode(),
        "ж".encode(),
        "😀".encode(),
    ]


def test_an_incomplete_byte_alphabet_is_refused(bases, tmp_path):
    copy_tokenizer(bases["byte_level"].folder, tmp_path)

    def drop(content):
        content["model"]["vocab"].pop(to_letters(b"\xfe"))

    edit_json(tmp_path / "tokenizer.json", drop)
    with pytest.raises(DataError, match="1 of the 256 bytes have no piece"):
        segment_words(read_tokenizer(tmp_path), Counter(["a"]))


def test_the_bare_tokenizer_has_only_merges(bases, tmp_path):
    copy_tokenizer(bases["byte_level"].folder, tmp_path)

    def add_word(content):
        content["model"]["ignore_merges"] = True
        content["model"]["vocab"]["zqzq"] = 420

    edit_json(tmp_path / "tokenizer.json", add_word)
    loaded = read_tokenizer(tmp_path)
    assert loaded.tokenizer.encode("zqzq", add_special_tokens=False).ids == [420]
    bare = strip_tokenizer(loaded, ["日"])
    assert bare.encode("zqzq").tokens == ["z", "q", "z", "q"]
    assert bare.encode("日").ids == [421]
    assert len(bare.encode("<|begin_of_text|>")) > 1

from collections import Counter

import pytest

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.model_proto import read_model, replace_pieces
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer
from megatron_adapt.tokenizer.vocabulary import Vocabulary
from tests.tokenizer.bases import edit_json

WORDS = Counter({"▁да": 5, "дада": 4, "зад": 1})
# In the order learned; "адад" comes too late to be built, since its letters are joined otherwise by then.
ORDER = ["да", "▁да", "дада", "за", "ад", "адад", "д", "а", "▁", "з"]
BPE = {piece: -float(at) for at, piece in enumerate(ORDER)}


def choose(base, scores, model_type, num_pieces, min_frequency=2, refuse=lambda piece: None):
    vocabulary = Vocabulary(base)
    template = replace_pieces(read_model(base.folder / "tokenizer.model"), [], model_type=model_type)
    vocabulary.choose(scores, template, refuse=refuse, counts=WORDS, min_frequency=min_frequency, num_pieces=num_pieces)
    return vocabulary


def test_what_is_no_use_goes_first_and_then_the_last_merges_but_no_character(bases):
    vocabulary = choose(bases["sentencepiece"], BPE, 2, 5)
    assert list(vocabulary.scores) == ["да", "▁да", "д", "а", "▁"]
    assert vocabulary.reasons == {"accepted": 5, "beyond the size": 1, "unreachable": 1, "rare": 3}


def test_what_the_filters_refuse_takes_along_what_is_made_of_it(bases):
    reasons = {"да": "script", "▁да": "old piece", "а": "part of a character"}
    refused = choose(bases["sentencepiece"], BPE, 2, 9, 1, lambda piece: reasons.get(piece.decode()))
    assert refused.reasons == {"accepted": 6, "script": 1, "unreachable": 2, "rare": 1}
    assert not {"да", "дада", "▁да"} & refused.scores.keys()
    taken = choose(bases["sentencepiece"], {"<s>": 0.0, "<0x41>": -1.0, **BPE}, 2, 9, 1)
    assert taken.reasons["added token"] == 2


def test_a_unigram_piece_that_is_worth_more_in_parts_or_lacks_a_character_goes(bases):
    scores = {"да": -2.0, "дада": -5.0, "зад": -6.0, "д": -7.0, "а": -8.0, "▁": -8.0}
    vocabulary = choose(bases["sentencepiece"], scores, 1, 9)
    # "дада" is worth -4 in two parts, "зад" has a letter that is no piece; the letters stay though they are not used.
    assert list(vocabulary.scores) == ["да", "д", "а", "▁"]
    assert vocabulary.reasons == {"accepted": 4, "unreachable": 2}
    assert list(choose(bases["sentencepiece"], scores, 1, 3).scores) == ["д", "а", "▁"]


def test_fixed_tokens_keep_their_side_and_bytes_stand_between(base, tmp_path):
    pieces = ["▁", "é", "t"] if base.kind == "sentencepiece" else ["Ã", "©", "Ã©"]
    scores = {piece: -float(at) for at, piece in enumerate(pieces)}
    template = read_model(base.folder / "tokenizer.model") if base.kind == "sentencepiece" else None
    vocabulary = Vocabulary(base)
    assert vocabulary.num_fixed == 256 + len(base.tokenizer.get_added_tokens_decoder())
    words = Counter(pieces)
    vocabulary.choose(scores, template, refuse=lambda piece: None, counts=words, min_frequency=1, num_pieces=3)
    vocabulary.write(tmp_path)
    made = read_tokenizer(tmp_path)
    assert made.vocab_size == vocabulary.num_fixed + len(vocabulary.scores)
    for index in base.tokenizer.get_added_tokens_decoder():
        assert made.tokenizer.id_to_token(index) == base.tokenizer.id_to_token(index)
    ids = made.tokenizer.encode("é the", add_special_tokens=False).ids
    assert made.tokenizer.decode(ids) == "é the"
    assert made.tokenizer.id_to_token(vocabulary.num_fixed) == next(iter(vocabulary.scores))


def test_a_sentencepiece_without_a_token_for_the_unknown_is_refused(bases, tmp_path):
    copy_tokenizer(bases["sentencepiece"].folder, tmp_path)

    def forget(content):
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<unk>"]
        content["model"].update(unk_token=None)
        del content["model"]["vocab"]["<unk>"]

    edit_json(tmp_path / "tokenizer.json", forget)
    edit_json(tmp_path / "tokenizer_config.json", lambda content: content.pop("unk_token"))
    with pytest.raises(DataError, match=r"no token for the unknown \(<unk>\), which a tokenizer\.model needs; add one"):
        Vocabulary(read_tokenizer(tmp_path))

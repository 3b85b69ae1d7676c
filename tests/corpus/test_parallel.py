import orjson
import pytest

from megatron_adapt.config import ParallelSettings, PrepareParallel
from megatron_adapt.corpus.documents import read_documents
from megatron_adapt.corpus.parallel import prepare_parallel
from megatron_adapt.corpus.prepare import TRAIN_FILE, VALID_FILE, is_validation
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import STAGE_FILE, read_json
from megatron_adapt.flags import load_config, to_flags

ASK = {"en-ja": "Translate into Japanese.", "ja-en": "英語に翻訳してください。"}


def write(path, pairs):
    path.write_bytes(b"".join(orjson.dumps(pair) + b"\n" for pair in pairs))
    return path


def make_pairs(count):
    return [{"id": f"page{at // 4}#{at}", "en": f"sentence {at}", "ja": f"文 {at}"} for at in range(count)]


def prepare(tmp_path, pairs, **changes):
    settings = ParallelSettings(**{"languages": ("en", "ja"), "valid_share": 0.3, **changes})
    config = PrepareParallel(input=(write(tmp_path / "p.jsonl", pairs),), output=tmp_path / "out", settings=settings)
    prepare_parallel(config)
    return [
        [document for _, document in read_documents([tmp_path / "out" / part])] for part in (TRAIN_FILE, VALID_FILE)
    ]


def test_plain_pairs_are_written_in_both_directions(tmp_path):
    train, valid = prepare(tmp_path, make_pairs(40))
    texts = {document["id"]: document["text"] for document in train + valid}
    assert len(texts) == 80
    assert texts["page1#5/en-ja"] == "sentence 5\n文 5"
    assert texts["page1#5/ja-en"] == "文 5\nsentence 5"


def test_instructions_keep_request_and_source_in_the_prompt(tmp_path):
    train, valid = prepare(tmp_path, make_pairs(40), format="instruction", instructions=ASK)
    documents = {document["id"]: document for document in train + valid}
    assert documents["page1#5/ja-en"] == {
        "id": "page1#5/ja-en",
        "prompt": "英語に翻訳してください。\n文 5\n",
        "text": "sentence 5",
    }


def test_both_directions_and_whole_pages_fall_on_one_side(tmp_path):
    parts = prepare(tmp_path, make_pairs(200), group_separator="#")
    pages = [{document["id"].partition("#")[0] for document in part} for part in parts]
    assert not pages[0] & pages[1]
    # The rule of prepare_corpus: a document called like the page is on the same side.
    assert all(is_validation(page, 0.3) for page in pages[1])
    assert not any(is_validation(page, 0.3) for page in pages[0])


def test_useless_pairs_are_counted_by_reason(tmp_path):
    pairs = [
        *make_pairs(40),
        {"id": "a", "en": " ", "ja": "空"},
        {"id": "b", "en": "README ", "ja": "README"},
        {"id": "c", "en": "sentence 7", "ja": "文 7"},
    ]
    train, valid = prepare(tmp_path, pairs)
    counts = read_json(tmp_path / "out" / STAGE_FILE)["counts"]["pairs"]
    expected = {"train": len(train) // 2, "valid": len(valid) // 2, "empty": 1, "untranslated": 1, "duplicate": 1}
    assert counts == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": ("en", "en")}, r"parallel\.languages: 'en' twice; name two languages"),
        ({"format": "instruction"}, r"parallel\.instructions: given for \[\], needed for \['en-ja', 'ja-en'\]"),
        ({"instructions": ASK}, r"given for \['en-ja', 'ja-en'\], needed for \[\]; .* none for the plain format"),
        ({"valid_share": 1.0}, r"parallel\.valid_share: 1\.0 is not between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ParallelSettings(**{"languages": ("en", "ja"), **changes})


def test_pairs_of_no_use_leave_nothing(tmp_path):
    with pytest.raises(DataError, match=r"none of 1 pairs is in the train part \(\{'empty': 1\}\); add pairs"):
        prepare(tmp_path, [{"en": "", "ja": "x"}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: no key 'ja'"):
        prepare(tmp_path, [{"en": "a"}])
    assert not (tmp_path / "out").exists()


def test_the_command_line_carries_the_requests(tmp_path):
    settings = ParallelSettings(languages=("en", "ja"), format="instruction", instructions=ASK)
    config = PrepareParallel(input=(tmp_path / "a",), output=tmp_path / "b", settings=settings)
    assert load_config(PrepareParallel, to_flags(config)) == config

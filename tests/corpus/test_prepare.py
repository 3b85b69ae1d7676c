import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.config import CorpusSettings, PrepareCorpus
from megatron_adapt.corpus.documents import read_documents
from megatron_adapt.corpus.prepare import TRAIN_FILE, VALID_FILE, is_validation, prepare_corpus
from megatron_adapt.corpus.sentences import read_splitter
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import STAGE_FILE, is_finished, read_json


def write(path, documents):
    path.write_bytes(b"".join(orjson.dumps(document) + b"\n" for document in documents))
    return path


def make_documents(start, stop):
    return [{"id": f"d{number}", "text": f"text of {number}"} for number in range(start, stop)]


def prepare(tmp_path, *inputs, name="out", overwrite=False, **changes):
    config = PrepareCorpus(
        input=inputs,
        output=tmp_path / name,
        overwrite=overwrite,
        settings=CorpusSettings(**{"valid_share": 0.2, **changes}),
    )
    prepare_corpus(config)
    return config


def read_parts(folder):
    return [[document for _, document in read_documents([folder / part])] for part in (TRAIN_FILE, VALID_FILE)]


def read_counts(folder):
    counts = read_json(folder / STAGE_FILE)["counts"]
    return counts["documents"], counts["bytes"]


def test_every_document_is_kept_once_or_counted_with_its_reason(tmp_path):
    documents = [
        *make_documents(0, 50),
        {"id": "empty", "text": ""},
        {"id": "blank", "text": " \n\t\u3000"},
        {"id": "again", "text": "text of 7"},
        {"id": "other", "text": "text of 7 "},
    ]
    config = prepare(tmp_path, write(tmp_path / "a.jsonl", documents))
    train, valid = read_parts(config.output)
    counts, sizes = read_counts(config.output)
    assert {name: count for name, count in counts.items() if count} == {
        "train": len(train),
        "valid": len(valid),
        "empty": 2,
        "duplicate": 1,
    }
    assert len(train) + len(valid) == 51
    assert sizes["train"] == sum(len(document["text"].encode()) for document in train)
    assert sizes["duplicate"] == len("text of 7")
    kept = {"again", "empty", "blank"} ^ {document["id"] for document in documents}
    assert {document["id"] for document in [*train, *valid]} == kept
    assert is_finished(config.output / STAGE_FILE, config=config)


def test_documents_keep_their_order_and_carry_only_id_and_text(tmp_path):
    documents = [{**document, "url": "x"} for document in make_documents(0, 100)]
    config = prepare(tmp_path, write(tmp_path / "a.jsonl", documents))
    for part in read_parts(config.output):
        numbers = [int(document["id"][1:]) for document in part]
        assert numbers == sorted(numbers)
        assert all(set(document) == {"id", "text"} for document in part)


def test_appending_a_file_moves_no_document(tmp_path):
    first = write(tmp_path / "a.jsonl", make_documents(0, 100))
    second = write(tmp_path / "b.jsonl", [*make_documents(90, 200)])
    before = read_parts(prepare(tmp_path, first, name="one").output)
    after = read_parts(prepare(tmp_path, first, second, name="two").output)
    for short, long in zip(before, after, strict=True):
        assert long[: len(short)] == short
    assert sum(map(len, after)) == 200


def test_translations_under_one_id_fall_on_the_same_side(tmp_path):
    here = prepare(tmp_path, write(tmp_path / "en.jsonl", make_documents(0, 100)), name="en").output
    translated = [{"id": f"d{number}", "text": f"テキスト {number}"} for number in range(100)]
    there = prepare(tmp_path, write(tmp_path / "ja.jsonl", translated), name="ja").output
    for one, two in zip(read_parts(here), read_parts(there), strict=True):
        assert [document["id"] for document in one] == [document["id"] for document in two]


def test_without_ids_the_text_decides_and_names(tmp_path):
    documents = [{"text": f"text {number}"} for number in range(100)]
    one = read_parts(prepare(tmp_path, write(tmp_path / "a.jsonl", documents), name="one").output)
    two = read_parts(prepare(tmp_path, write(tmp_path / "b.jsonl", documents[::-1]), name="two").output)
    for first, second in zip(one, two, strict=True):
        assert first
        assert first == second[::-1]
    names = {document["id"] for part in one for document in part}
    assert len(names) == 100


def test_numbers_are_ids_too(tmp_path):
    documents = [{"id": number, "text": f"text {number}"} for number in range(50)]
    train, valid = read_parts(prepare(tmp_path, write(tmp_path / "a.jsonl", documents)).output)
    assert {document["id"] for document in [*train, *valid]} == {str(number) for number in range(50)}


@settings(max_examples=50)
@given(st.text(), st.floats(0.01, 0.5), st.floats(0, 0.49))
def test_a_larger_share_only_adds_validation_documents(name, share, more):
    assert is_validation(name, share) <= is_validation(name, share + more)


def test_the_share_is_kept_on_average():
    held_out = sum(is_validation(f"name {number}", 0.1) for number in range(10_000))
    assert 900 < held_out < 1100  # 3.3 standard deviations


def test_max_bytes_closes_the_training_part_but_not_the_validation_part(tmp_path):
    source = write(tmp_path / "a.jsonl", make_documents(0, 200))
    whole_train, whole_valid = read_parts(prepare(tmp_path, source, name="whole").output)
    limit = sum(len(document["text"]) for document in whole_train[:40]) + 5
    config = prepare(tmp_path, source, name="part", max_bytes=limit)
    train, valid = read_parts(config.output)
    counts, sizes = read_counts(config.output)
    assert train == whole_train[:40]
    assert valid == whole_valid
    assert sizes["train"] == limit - 5
    assert counts["over_max_bytes"] == len(whole_train) - 40


def test_a_document_that_does_not_fit_lets_no_shorter_one_pass(tmp_path):
    texts = ["a" * 10, "b" * 100, "c"]
    names = [name for name in map(str, range(100)) if not is_validation(name, 0.2)][:3]
    held_out = next(name for name in map(str, range(100)) if is_validation(name, 0.2))
    documents = [{"id": name, "text": text} for name, text in zip([*names, held_out], [*texts, "v"], strict=True)]
    train, _ = read_parts(prepare(tmp_path, write(tmp_path / "a.jsonl", documents), max_bytes=50).output)
    assert [document["text"] for document in train] == ["a" * 10]


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        ([], {}, r"a\.jsonl: no documents; give files with one JSON object a line$"),
        ([{"text": " "}], {}, r"a\.jsonl: all 1 documents were dropped \(1 empty\); check prepare\.text_key"),
        (
            [{"text": "a"}],
            {"valid_share": 1e-9},
            r"a\.jsonl: none of 1 documents fell into the validation part; raise prepare\.valid_share \(1e-09\) or add",
        ),
        (
            [{"text": "a"}],
            {"valid_share": 1 - 1e-9},
            r"a\.jsonl: none of 1 documents is left for the training part; lower prepare\.valid_share",
        ),
        (
            make_documents(0, 50),
            {"max_bytes": 3},
            r"a\.jsonl: none of 50 documents is left for the training part; raise prepare\.max_bytes \(3\)$",
        ),
        ([{"id": [1], "text": "a"}], {}, r"a\.jsonl:1: 'id' is list, not a string or number; correct the line$"),
        ([{"body": "a"}], {}, r"a\.jsonl:1: no key 'text'"),
    ],
)
def test_a_corpus_of_no_use_is_refused_and_leaves_nothing(tmp_path, documents, changes, message):
    source = write(tmp_path / "a.jsonl", documents)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, source, **changes)
    assert list(tmp_path.iterdir()) == [source]


def test_a_missing_input_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(DataError, match=r"^--input: .*gone\.jsonl is not a file; check the path$"):
        prepare(tmp_path, write(tmp_path / "a.jsonl", make_documents(0, 9)), tmp_path / "gone.jsonl")


def test_an_output_is_replaced_only_when_told(tmp_path):
    source = write(tmp_path / "a.jsonl", make_documents(0, 50))
    prepare(tmp_path, source)
    with pytest.raises(ConfigError, match=r"out: exists already; name another output or add --overwrite$"):
        prepare(tmp_path, source)
    prepare(tmp_path, source, overwrite=True)


def test_rules_near_duplicates_and_normal_form_are_counted_by_reason(tmp_path):
    page = " ".join(f"word{number}" for number in range(200))
    documents = [
        *make_documents(0, 40),
        {"id": "page", "text": page},
        {"id": "near", "text": page.upper() + "!"},
        {"id": "short", "text": "hm"},
        {"id": "script", "text": "\u043e\u0434\u043d\u043e \u0434\u0432\u0430 \u0442\u0440\u0438"},
        {"id": "composed", "text": "\u00e9t\u00e9 a b c d e"},
        {"id": "decomposed", "text": "e\u0301te\u0301 a b c d e"},
    ]
    source = write(tmp_path / "a.jsonl", documents)
    config = PrepareCorpus(
        input=(source,),
        output=tmp_path / "out",
        scripts=("Latin",),
        settings=CorpusSettings(
            valid_share=0.2, min_characters=5, min_script_share=0.5, near_duplicates=0.8, normal_form="NFC"
        ),
    )
    prepare_corpus(config)
    counts, _ = read_counts(config.output)
    dropped = {name: counts[name] for name in ("short", "script", "near_duplicate", "duplicate", "empty")}
    # The forty short texts differ in their numbers alone, but runs of thirteen characters hold all of such a text.
    assert dropped == {"short": 1, "script": 1, "near_duplicate": 1, "duplicate": 1, "empty": 0}
    kept = {document["id"] for part in read_parts(config.output) for document in part}
    assert kept >= {"page", "composed", "d1"}


def test_a_script_share_without_scripts_is_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", make_documents(0, 5))
    with pytest.raises(ConfigError, match=r"prepare\.min_script_share: the language's scripts are not named; add --sc"):
        prepare(tmp_path, source, min_script_share=0.5)


def test_sentences_are_written_beside_the_text(tmp_path):
    documents = [
        {"id": f"d{number}", "text": f"House {number} is open! Is the other one?\nNo more of it."}
        for number in range(60)
    ]
    source = write(tmp_path / "a.jsonl", documents)
    config = prepare(tmp_path, source, sentences="learned")
    for part in read_parts(config.output):
        for document in part:
            assert "".join(document["sentences"]) == document["text"]
            assert len(document["sentences"]) == 3
    assert read_splitter(config.output / "sentences.json").split("So. It is.") == ["So. ", "It is."]
    plain = prepare(tmp_path, source, name="plain")
    assert all("sentences" not in document for part in read_parts(plain.output) for document in part)
    with pytest.raises(ConfigError, match="nltk_data has no punkt_tab/klingon"):
        prepare(tmp_path, source, name="other", sentences="klingon")

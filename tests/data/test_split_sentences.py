"""preprocess_data --split-sentences: sentences are sequences of their document, as in Megatron-LM."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_adapt.config import CheckTokens, DataSettings, MergeTokens, PreprocessData, ShowTokens
from megatron_adapt.corpus import sentences
from megatron_adapt.corpus.sentences import learn_splitter, read_splitter
from megatron_adapt.data import crew, split
from megatron_adapt.data.align import cut_documents
from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.doctor import check_tokens, examine
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.index import bin_path, idx_path, read_tokens
from megatron_adapt.data.inspect import measure_tokens, show_tokens
from megatron_adapt.data.manifest import read_header, unfinished_folder
from megatron_adapt.data.megatron_blend import MegatronWindows
from megatron_adapt.data.merge import merge_tokens
from megatron_adapt.data.plan import make_plan
from megatron_adapt.data.record import read_cut, read_record
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.pieces import encode_texts, read_tokenizer
from megatron_adapt.train.documents import find_documents
from tests.data.corpora import make_config, make_tokenizer, read_files, write_lines

EOD = 1
# "approx" always has a full stop, mostly before a word in lower case; every other last word stands without one too.
TEXTS = [
    *(
        f"The wall is approx. {number} metres long and old.\nNobody knows how long it was. It was built by the town. "
        "The town is small and nobody lives there now.\n\n"
        f"An old house of approx. equal size stands beside wall {number}."
        for number in range(100, 200)
    ),
    "",
    " \n ",
    "  Leading white space. And white space behind.  \n",
    "\n\nA heading\n\nText under it",
    "今日は良い天気です。明日は？「雨だ。」と言った。",
    "One sentence alone",
]
KEPT = [text for text in TEXTS if text.strip()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizers") / "plain")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_lines(tmp_path_factory.mktemp("corpus") / "c.jsonl", TEXTS)


def cut(corpus, tokenizer, prefix, **other):
    config = {"split_sentences": True, **other}
    return preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=prefix, **config))


@pytest.fixture(scope="module")
def prefix(corpus, tokenizer, tmp_path_factory) -> Path:
    """The output of one worker and one chunk."""
    prefix = tmp_path_factory.mktemp("tokens") / "en"
    cut(corpus, tokenizer, prefix)
    return prefix


def list_sequences(prefix: Path) -> list[list[list[int]]]:
    """The ids of every sentence of every document, as megatron-core reads them."""
    dataset = IndexedDataset(str(prefix))
    bounds = pairwise(dataset.document_indices.tolist())
    return [[dataset[at].tolist() for at in range(first, end)] for first, end in bounds]


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("keep_newlines", [True, False])
def test_files_equal_those_of_megatrons_builder_byte_for_byte(corpus, tokenizer, tmp_path, keep_newlines, append_eod):
    cut(corpus, tokenizer, tmp_path / "p", keep_newlines=keep_newlines, append_eod=append_eod)
    splitter, loaded = read_splitter(tmp_path / "p.sentences.json"), read_tokenizer(tokenizer)
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    num_sentences = 0
    for text in KEPT:
        pieces = splitter.split(text) if keep_newlines else [piece.rstrip() for piece in splitter.split(text)]
        ids = encode_texts(loaded, pieces)
        lengths = [len(sentence) for sentence in ids]
        document = [token for sentence in ids for token in sentence]
        if append_eod:
            document.append(EOD)
            lengths[-1] += 1
        builder.add_document(document, lengths)
        num_sentences += len(lengths)
    builder.finalize(str(tmp_path / "m.idx"))
    assert read_files(tmp_path / "p") == read_files(tmp_path / "m")
    file = read_tokens(tmp_path / "p")
    assert (file.num_documents, file.num_sequences) == (len(KEPT), num_sentences)
    assert num_sentences > 4 * len(KEPT)


def test_abbreviations_are_learned_from_the_input_and_kept(prefix):
    kept = read_splitter(prefix.with_name("en.sentences.json"))
    assert "approx" in kept.parameters.abbrev_types
    assert sentences.export_parameters(kept) == sentences.export_parameters(learn_splitter(TEXTS))
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "en.bin", "en.idx", "en.sentences.json", "en.stage.json",
    ]  # fmt: skip


def decode(prefix: Path, tokenizer: Path) -> list[list[str]]:
    loaded = read_tokenizer(tokenizer).tokenizer
    return [[loaded.decode(ids) for ids in document] for document in list_sequences(prefix)]


def test_white_space_between_sentences_is_dropped_or_kept(corpus, tokenizer, prefix, tmp_path):
    dropped = decode(prefix, tokenizer)
    assert dropped[0] == [
        "The wall is approx. 100 metres long and old.",
        "Nobody knows how long it was.",
        "It was built by the town.",
        "The town is small and nobody lives there now.",
        "An old house of approx. equal size stands beside wall 100.",
    ]
    assert dropped[-4:] == [
        ["  Leading white space.", "And white space behind."],
        ["\n\nA heading", "Text under it"],
        ["今日は良い天気です。", "明日は？", "「雨だ。」", "と言った。"],
        ["One sentence alone"],
    ]
    cut(corpus, tokenizer, tmp_path / "p", keep_newlines=True)
    kept = decode(tmp_path / "p", tokenizer)
    assert ["".join(document) for document in kept] == KEPT
    assert [len(document) for document in kept] == [len(document) for document in dropped]
    assert kept[0][0].endswith("old.\n")
    counts = [read_record(name).bytes for name in (tmp_path / "p", prefix)]
    assert counts == [sum(len("".join(document).encode()) for document in documents) for documents in (kept, dropped)]


def test_several_keys_are_cut_alike(tokenizer, tmp_path):
    rows = [{"text": text, "title": text[:40]} for text in KEPT]
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    cut(path, tokenizer, tmp_path / "p", json_keys=("text", "title"), workers=2, partitions=5)
    splitter = read_splitter(tmp_path / "p.sentences.json")
    for key in ("text", "title"):
        found = [len(document) for document in list_sequences(tmp_path / f"p_{key}")]
        assert found == [len(splitter.split(row[key])) for row in rows if row[key].strip()]


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(
    "more",
    [{"workers": 3, "partitions": 20}, {"partitions": 400}, {"workers": 2, "backend": "gigatoken"}],
    ids=lambda more: "-".join(f"{name}{value}" for name, value in more.items()),
)
def test_workers_chunks_and_backend_do_not_show(corpus, tokenizer, prefix, tmp_path, more):
    if "backend" in more:
        pytest.importorskip("gigatoken")
    cut(corpus, tokenizer, tmp_path / "p", **more)
    assert read_files(tmp_path / "p") == read_files(prefix)
    assert read_record(tmp_path / "p") == read_record(prefix)


def test_what_is_learned_does_not_depend_on_the_process(corpus, tmp_path):
    program = (
        "import sys; from pathlib import Path; from megatron_adapt.config import PreprocessData as P;"
        "from megatron_adapt.data.split import choose_splitter as c; a = list(map(Path, sys.argv[1:]));"
        "print(c(P(input=(a[0],), tokenizer=a[1], output_prefix=a[1], split_sentences=True), a[1]).hash_parameters())"
    )
    command = [sys.executable, "-c", program, corpus, tmp_path]
    seeds = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    first, second = (subprocess.check_output(command, env=seed, text=True, timeout=60) for seed in seeds)
    assert len(first) == 33
    assert first == second


@pytest.fixture
def interrupted(corpus, tokenizer, tmp_path, monkeypatch) -> Path:
    """A copy of the corpus; its run at ``p`` was interrupted when 10 of its chunks were done."""
    copy = tmp_path / "c.jsonl"
    copy.write_bytes(corpus.read_bytes())
    give, handed = crew.Worker.give, []

    def give_or_fail(worker, task):
        handed.append(task)
        if len(handed) > 10:
            raise KeyboardInterrupt
        give(worker, task)

    with monkeypatch.context() as patched:
        patched.setattr(crew.Worker, "give", give_or_fail)
        with pytest.raises(KeyboardInterrupt):
            cut(copy, tokenizer, tmp_path / "p", partitions=20)
    return copy


def test_a_run_goes_on_without_learning_again(interrupted, tokenizer, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(split, "learn_splitter", None)
    cut(interrupted, tokenizer, tmp_path / "p", workers=2)
    assert read_files(tmp_path / "p") == read_files(prefix)
    assert not unfinished_folder(tmp_path / "p").exists()


def test_what_was_learned_is_learned_again_where_it_is_lost(interrupted, tokenizer, prefix, tmp_path):
    (saved,) = unfinished_folder(tmp_path / "p").glob("sentences.*.json")
    saved.write_bytes(b"")
    cut(interrupted, tokenizer, tmp_path / "p")
    assert read_files(tmp_path / "p") == read_files(prefix)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"keep_newlines": True}, "keep_newlines"),
        ({"split_sentences": False}, "lang, split_sentences"),
        ({"lang": "FILE.json"}, "lang"),
    ],
)
def test_other_ways_to_cut_do_not_mix(interrupted, tokenizer, tmp_path, other, name):
    if "lang" in other:
        other = {"lang": str(tmp_path / "other.json")}
        sentences.write_splitter(learn_splitter(["Another text, of approx. nothing."]), tmp_path / "other.json")
    with pytest.raises(ConfigError, match=rf"p\.unfinished: an unfinished run with another {name} lies there"):
        cut(interrupted, tokenizer, tmp_path / "p", **other)


def test_parameters_of_a_text_that_has_changed_are_not_used(interrupted, tokenizer, tmp_path):
    # Behind what is done, so only the parameters would differ.
    content = interrupted.read_bytes()
    more = orjson.dumps({"text": "It stands no. seven in the row, no. eight is new, no. nine is old. " * 40})
    interrupted.write_bytes(content + more + b"\n")
    with pytest.raises(ConfigError, match="an unfinished run with another lang lies there"):
        cut(interrupted, tokenizer, tmp_path / "p")
    assert read_header(unfinished_folder(tmp_path / "p"))["lang"]
    cut(interrupted, tokenizer, tmp_path / "p", overwrite=True)
    cut(interrupted, tokenizer, tmp_path / "q")
    assert read_files(tmp_path / "p") == read_files(tmp_path / "q")


def test_shuffled_documents_keep_their_sentences(corpus, tokenizer, prefix, tmp_path):
    cut(corpus, tokenizer, tmp_path / "p", shuffle_seed=3, workers=2, partitions=7)
    plain, shuffled = list_sequences(prefix), list_sequences(tmp_path / "p")
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)
    # The order is that of whole documents under the same seed.
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "whole", shuffle_seed=3))
    whole = IndexedDataset(str(tmp_path / "whole"))
    decoder = read_tokenizer(tokenizer).tokenizer
    texts = [decoder.decode(whole[at].tolist()) for at in range(len(whole))]
    found = ["".join(document) for document in decode(tmp_path / "p", tokenizer)]
    assert ["".join(text.split()) for text in texts] == ["".join(text.split()) for text in found]


# ---------------------------------------------------------------- where abbreviations come from


def test_other_data_are_cut_alike_by_a_file(prefix, tokenizer, tmp_path):
    path = write_lines(tmp_path / "valid.jsonl", ["It is approx. nine metres long. Nobody knows."])
    cut(path, tokenizer, tmp_path / "alone")
    parameters = prefix.with_name("en.sentences.json")
    cut(path, tokenizer, tmp_path / "alike", lang=str(parameters))
    assert decode(tmp_path / "alike", tokenizer) == [["It is approx. nine metres long.", "Nobody knows."]]
    assert not (tmp_path / "alike.sentences.json").exists()
    with pytest.raises(DataError, match=r"--lang: .*none\.json is not a file; check the path"):
        cut(path, tokenizer, tmp_path / "p", lang=str(tmp_path / "none.json"))
    # A file that stands where a run would keep what it learned is read, and left alone.
    kept = tmp_path / "alone.sentences.json"
    cut(path, tokenizer, tmp_path / "alone", lang=str(kept), overwrite=True)
    assert kept.exists()
    cut(path, tokenizer, tmp_path / "alone", lang=str(parameters), overwrite=True)
    assert not kept.exists()


def test_a_language_of_an_installed_nltk_data_is_used(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text("approx\n")
    for name in ("collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (folder / name).write_text("")
    monkeypatch.setattr(sentences.nltk.data, "path", [str(tmp_path)])
    path = write_lines(tmp_path / "c.jsonl", ["It is approx. nine. So."])
    cut(path, tokenizer, tmp_path / "p", lang="english", workers=2)
    assert decode(tmp_path / "p", tokenizer) == [["It is approx. nine.", "So."]]
    assert not (tmp_path / "p.sentences.json").exists()


def test_a_language_that_is_not_installed_is_one_line(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sentences.nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"nltk_data has no punkt_tab/english; install it, or learn"):
        cut(corpus, tokenizer, tmp_path / "p", lang="english")
    assert not unfinished_folder(tmp_path / "p").exists()


def test_mistakes_of_the_input_are_named_with_their_line(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "Good. Better."}\n{bad}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:2: no valid JSON .*, or use --on-error skip"):
        cut(path, tokenizer, tmp_path / "p")
    path.write_bytes(b'{"text": " "}\n')
    with pytest.raises(DataError, match=r"c\.jsonl: no documents under 'text' \(1 empty ones, 0 lines skipped\)"):
        cut(path, tokenizer, tmp_path / "q")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_newlines": True}, "--keep-newlines: does nothing by itself; add --split-sentences"),
        ({"lang": "english"}, "--lang: does nothing by itself; add --split-sentences"),
        ({"lang": "", "split_sentences": True}, "--lang: empty; name learned"),
        (
            {"split_sentences": True, "settings": DataSettings(prompt_key="prompt")},
            r"--split-sentences: a prompt \('prompt'\) is encoded as one with its text, .*; leave out --prompt-key",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        PreprocessData(input=(Path("c"),), tokenizer=Path("t"), output_prefix=Path("p"), **values)


# ---------------------------------------------------------------- what reads the files


def test_inspection_reads_documents_whole(prefix, tokenizer, caplog):
    found = [item for item in examine(prefix, read_tokenizer(tokenizer)) if "repeat" not in item]
    assert found == []
    with caplog.at_level("INFO"):
        check_tokens(CheckTokens(prefix=(prefix,), tokenizer=tokenizer))
    figures, lengths = measure_tokens(prefix), read_tokens(prefix).lengths()
    assert (figures.documents, figures.tokens, figures.longest) == (len(KEPT), lengths.sum(), lengths.max())
    shown = show_tokens(ShowTokens(prefix=prefix, tokenizer=tokenizer, document=len(KEPT) - 2))
    assert shown == "今日は良い天気です。明日は？「雨だ。」と言った。<|end|>"


def test_merged_files_are_those_of_all_inputs(corpus, tokenizer, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_adapt.data.merge._BLOCK_DOCUMENTS", 3)
    lang = {"lang": str(prefix.with_name("en.sentences.json"))}
    halves = write_lines(tmp_path / "1", TEXTS[:60]), write_lines(tmp_path / "2", TEXTS[60:])
    parts = tmp_path / "a", tmp_path / "b"
    for half, part in zip(halves, parts, strict=True):
        cut(half, tokenizer, part, **lang)
    merge_tokens(MergeTokens(prefix=parts, output_prefix=tmp_path / "ab"))
    assert read_files(tmp_path / "ab") == read_files(prefix)
    assert read_cut(tmp_path / "ab") == {"split_sentences": True, "keep_newlines": False}
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "whole"))
    message = r"whole: made with split_sentences = false, .*, .*en with split_sentences = true, .*; tokenise both with"
    with pytest.raises(DataError, match=message):
        merge_tokens(MergeTokens(prefix=(prefix, tmp_path / "whole"), output_prefix=tmp_path / "c"))
    assert not idx_path(tmp_path / "c").exists()


def test_windows_hold_whole_documents_in_their_order(prefix):
    file = read_tokens(prefix)
    starts_D1, length = file.starts(), 64
    assert len(starts_D1) == len(KEPT) + 1
    plan = make_plan({"en": 1.0}, 640, {"en": file.num_tokens}, seq_length=length, global_batch_size=2, seed=1)
    windows = BlendedWindows(plan, {"en": prefix})
    _, found = windows.locate(0, len(windows))
    ids_NT1 = windows.read_windows(0, len(windows)).ids_NT1
    for start, ids_T1 in zip(found.starts_N.tolist(), ids_NT1, strict=True):
        assert ids_T1.tolist() == np.take(file.tokens_N, range(start, start + length + 1), mode="wrap").tolist()
        # Attention inside documents sees the documents, not the sentences.
        inside = [at - start for at in starts_D1.tolist() if start < at < start + length]
        if start + length < file.num_tokens:
            assert find_documents(ids_T1[None, :-1].astype(np.int64), EOD).tolist() == [0, *inside, length]
    cuts = set(cut_documents(starts_D1, 400).tolist())
    assert cuts <= {*starts_D1.tolist(), file.num_tokens - 1}


def test_megatrons_order_which_tears_documents_apart_is_refused(prefix, tmp_path):
    tokens = read_tokens(prefix).num_tokens
    plan = make_plan({"en": 1.0}, 640, {"en": tokens}, seq_length=64, global_batch_size=2, seed=1)
    with pytest.raises(
        ConfigError, match=r"train\.blend_engine: megatron shuffles sentences apart .* in en; use adapt"
    ):
        MegatronWindows(plan, {"en": prefix}, tmp_path)
    assert bin_path(prefix).exists()

"""What a build writes, and what it refuses, whatever the method."""

import json
import typing

import pytest

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer import build
from megatron_adapt.tokenizer.build import METHODS, REPORT_FILE, build_tokenizer
from megatron_adapt.tokenizer.id_map import read_id_map
from megatron_adapt.tokenizer.pieces import piece_bytes, read_tokenizer
from tests.tokenizer.bases import make_texts, write_corpus
from tests.tokenizer.guarantees import encode, extend


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    return {language: write_corpus(root / f"{language}.jsonl", make_texts(language)) for language in ("en", "ru")}


def make_config(base, corpora, output, donor, *, old=True, **settings):
    own = {"donor": donor} if settings.get("method") == "transplant" else {}
    return BuildTokenizer(
        base=base.folder,
        corpus=(corpora["ru"],),
        old_corpus=(corpora["en"],) if old else (),
        output=output,
        settings=TokenizerSettings(**{"size": "60", **settings, **own}),
    )


@pytest.fixture(scope="module")
def built(bases, corpora, tmp_path_factory):
    """Every base by every method."""
    root = tmp_path_factory.mktemp("built")
    donor = extend(bases["byte_level"].folder, root / "donor", make_texts("ru"), ("Cyrillic",), size=60).folder
    for kind, base in bases.items():
        for method in METHODS:
            size = "450" if method == "replace" else "60"
            build_tokenizer(make_config(base, corpora, root / f"{kind}-{method}", donor, method=method, size=size))
    return {(kind, method): root / f"{kind}-{method}" for kind in bases for method in METHODS}


def test_every_method_of_the_config_has_a_function():
    assert set(METHODS) == set(typing.get_args(typing.get_type_hints(TokenizerSettings)["method"]))


def test_the_report_adds_up(bases, built):
    for (kind, method), folder in built.items():
        report = json.loads((folder / REPORT_FILE).read_text())
        after = read_tokenizer(folder)
        assert report["vocab_size"] == after.vocab_size == report["pieces_kept"] + report["pieces_added"]
        assert report["base_vocab_size"] == bases[kind].vocab_size == report["pieces_kept"] + report["pieces_dropped"]
        assert len(report["new_pieces"]) == report["pieces_added"] > 0
        if method in ("continue", "merge", "transplant"):
            assert (report["pieces_dropped"], report["ids_moved"]) == (0, 0)


def test_the_report_says_what_became_of_every_candidate(built):
    for (_, method), folder in built.items():
        candidates = json.loads((folder / REPORT_FILE).read_text())["candidates"]
        assert all(isinstance(count, int) and count >= 0 for count in candidates.values()), method
        assert sum(candidates.values()) > 0


def test_the_stage_record_has_the_counts_of_the_report(built):
    for folder in built.values():
        report = json.loads((folder / REPORT_FILE).read_text())
        counts = json.loads((folder / "stage.json").read_text())["counts"]
        assert counts == {name: value for name, value in report.items() if name != "new_pieces"}


def test_the_map_names_old_ids_that_spell_the_new_ones(bases, built):
    for (kind, method), folder in built.items():
        after = read_tokenizer(folder)
        id_map = read_id_map(after)
        assert (id_map.base_vocab_size, id_map.vocab_size) == (bases[kind].vocab_size, after.vocab_size)
        old, new = piece_bytes(bases[kind]), piece_bytes(after)
        for index, spelling in id_map.pieces.items():
            assert b"".join(old[part] for part in spelling) == new[index], (method, index)


def test_drift_is_in_the_report_where_an_old_corpus_is_named(bases, built, corpora, tmp_path):
    texts = make_texts("en")
    for (kind, method), folder in built.items():
        drift = json.loads((folder / REPORT_FILE).read_text())["drift"]
        assert drift["documents"] == len(texts)
        if method in ("continue", "merge", "transplant"):
            differing = sum(
                old != new
                for old, new in zip(encode(bases[kind], texts), encode(read_tokenizer(folder), texts), strict=True)
            )
            assert drift["touched"] == differing
    build_tokenizer(make_config(bases["byte_level"], corpora, tmp_path / "out", None, old=False))
    assert "drift" not in json.loads((tmp_path / "out" / REPORT_FILE).read_text())


def test_too_much_drift_leaves_no_output(bases, corpora, tmp_path):
    settings = {"method": "replace", "size": "450", "max_drift": 0}
    config = make_config(bases["byte_level"], corpora, tmp_path / "out", None, **settings)
    with pytest.raises(DataError, match=r"documents \(.*%\) would change"):
        build_tokenizer(config)
    assert not list(tmp_path.iterdir())


def test_a_limit_on_drift_needs_text_to_measure(bases, corpora, tmp_path):
    config = make_config(bases["byte_level"], corpora, tmp_path / "out", None, old=False, max_drift=0.5)
    with pytest.raises(ConfigError, match=r"tokenizer.max_drift: 0.5 has no text to be measured on; name it: --old-c"):
        build_tokenizer(config)


def test_an_output_that_exists_is_kept_unless_told_otherwise(bases, corpora, tmp_path):
    config = make_config(bases["byte_level"], corpora, tmp_path / "out", None)
    build_tokenizer(config)
    before = (tmp_path / "out" / REPORT_FILE).read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        build_tokenizer(config)
    assert (tmp_path / "out" / REPORT_FILE).read_bytes() == before


def test_the_output_may_not_hold_an_input(bases, corpora):
    config = make_config(bases["byte_level"], corpora, corpora["ru"].parent, None)
    with pytest.raises(ConfigError, match=r"--output: .* holds .*ru\.jsonl, which is read; name another output"):
        build_tokenizer(config)


def test_a_guarantee_that_fails_leaves_no_output(bases, corpora, tmp_path, monkeypatch):
    def lose_a_merge(base, config, folder):
        made = METHODS["continue"](base, config, folder)
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["merges"].pop()
        path.write_text(json.dumps(content))
        return made

    monkeypatch.setitem(build.METHODS, "merge", lose_a_merge)
    with pytest.raises(DataError, match=r"\.out\..*: 1 pieces are unreachable; the output was not written"):
        build_tokenizer(make_config(bases["byte_level"], corpora, tmp_path / "out", None, method="merge"))
    assert not (tmp_path / "out").exists()

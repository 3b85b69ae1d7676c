import importlib
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megatron_adapt.data import backend
from megatron_adapt.data.backend import choose_backend, compare_ids, find_affixes, load_encoder, pack_ids
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.record import record_path
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import read_json
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.data.corpora import TEXTS, make_config, make_tokenizer, read_files, write_lines

_FAKE = """
from tokenizers import Tokenizer as Library

class Tokenizer:
    @staticmethod
    def from_json(content):
        if "piece it refuses" in content:
            raise ValueError("a piece it refuses")
        return Tokenizer(Library.from_str(content))

    def __init__(self, library):
        self.library = library

    def encode(self, text):
        import numpy
        text = text.decode() if isinstance(text, bytes) else text
        ids = self.library.encode(text, add_special_tokens=False).ids
        return numpy.array(ids[::-1] if "ODD ONE" in text else ids, numpy.uint32)
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizers") / "plain", bos=True)


@pytest.fixture
def fake_gigatoken(tmp_path, monkeypatch):
    """A module of that name that errs where ``ODD ONE`` stands in a text."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "gigatoken.py").write_text(_FAKE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "gigatoken", raising=False)
    yield
    sys.modules.pop("gigatoken", None)  # or the next test would find it


def backend_of(prefix: Path) -> str:
    return read_json(record_path(prefix))["counts"]["backend"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_real_gigatoken_gives_the_same_output(tmp_path, kind, bos):
    pytest.importorskip("gigatoken")
    tokenizer = make_tokenizer(tmp_path / "tokenizer", kind=kind, bos=bos)
    texts = [*TEXTS, *backend._ODD_TEXTS, *(text * 50 for text in backend._ODD_TEXTS)]
    path = write_lines(tmp_path / "c.jsonl", texts)
    for name in ("gigatoken", "tokenizers"):
        config = make_config(path, tokenizer=tokenizer, prefix=tmp_path / name, backend=name, partitions=3)
        preprocess_data(config)
        assert backend_of(tmp_path / name) == name
    assert read_files(tmp_path / "gigatoken") == read_files(tmp_path / "tokenizers")


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_backend_that_gives_the_same_is_taken(tokenizer, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", TEXTS)
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", backend="auto"))
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "q"))
    assert (backend_of(tmp_path / "p"), backend_of(tmp_path / "q")) == ("gigatoken", "tokenizers")
    assert read_files(tmp_path / "p") == read_files(tmp_path / "q")


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_backend_whose_memory_grows_is_loaded_anew(tokenizer, monkeypatch):
    loaded = read_tokenizer(tokenizer).tokenizer
    library, made = importlib.import_module("gigatoken").Tokenizer, []
    from_json = library.from_json
    monkeypatch.setattr(library, "from_json", lambda content: made.append(content) or from_json(content))
    expected = [encoding.ids for encoding in loaded.encode_batch_fast(TEXTS)]
    for max_bytes, num_loads in ((1 << 40, 1), (-(1 << 40), 4)):
        monkeypatch.setattr(backend, "_MAX_CACHE_BYTES", max_bytes)
        made.clear()
        encode = load_encoder("gigatoken", loaded.to_str(), np.dtype(np.int64), find_affixes(loaded))
        assert [[ids.tolist() for ids in encode(TEXTS)] for _ in range(3)] == [expected] * 3
        assert len(made) == num_loads


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_backend_that_errs_on_the_sample_is_left_loudly(tokenizer, tmp_path, caplog):
    path = write_lines(tmp_path / "c.jsonl", ["an ODD ONE here" if at % 3 else text for at, text in enumerate(TEXTS)])
    said = r"gigatoken gives other ids than tokenizers for 'an ODD ONE here': \[.*\] instead of \[.*\] at token 1"
    with pytest.raises(DataError, match=rf"plain: {said}; use --backend tokenizers"):
        choose_backend("gigatoken", read_tokenizer(tokenizer), ["good", "an ODD ONE here", "bad ODD ONE"])
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", read_tokenizer(tokenizer), ["an ODD ONE here"]) == "tokenizers"
    assert "going on with tokenizers, which is slower" in caplog.text
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", backend="auto"))
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "q"))
    assert backend_of(tmp_path / "p") == "tokenizers"
    assert read_files(tmp_path / "p") == read_files(tmp_path / "q")


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_backend_that_errs_later_is_found_by_the_samples_of_the_chunks(tokenizer, tmp_path, caplog, monkeypatch):
    # The first sample of a compressed file is its beginning.
    path = write_lines(tmp_path / "c.jsonl", [f"text {n}" for n in range(2000)] + ["ODD ONE"] * 2000)
    monkeypatch.setattr("megatron_adapt.data.encode.sample_lines", lambda *_: [b'{"text": "text 1"}'])
    config = {"tokenizer": tokenizer, "partitions": 20}
    with pytest.raises(DataError, match=r"gigatoken gives other ids than tokenizers for 'ODD ONE'"):
        preprocess_data(make_config(path, prefix=tmp_path / "p", backend="gigatoken", **config))
    with caplog.at_level(logging.WARNING):
        preprocess_data(make_config(path, prefix=tmp_path / "p", backend="auto", overwrite=True, **config))
    assert "beginning anew with tokenizers, which is slower" in caplog.text
    preprocess_data(make_config(path, prefix=tmp_path / "q", **config))
    assert backend_of(tmp_path / "p") == "tokenizers"
    assert read_files(tmp_path / "p") == read_files(tmp_path / "q")


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_tokenizer_that_only_the_backend_refuses_leaves_nothing_or_goes_on_without_it(tmp_path, caplog):
    folder = make_tokenizer(tmp_path / "other")
    library = read_tokenizer(folder).tokenizer
    library.add_tokens(["piece it refuses"])
    library.save(str(folder / "tokenizer.json"))
    path = write_lines(tmp_path / "c.jsonl", TEXTS)
    with pytest.raises(
        DataError, match=r"other: gigatoken cannot be used with this tokenizer \(a piece it refuses\); use"
    ):
        preprocess_data(make_config(path, tokenizer=folder, prefix=tmp_path / "p", backend="gigatoken"))
    assert not list(tmp_path.glob("p*"))
    with caplog.at_level(logging.WARNING):
        preprocess_data(make_config(path, tokenizer=folder, prefix=tmp_path / "p", backend="auto", workers=2))
    assert caplog.text.count("going on with tokenizers") == 1
    preprocess_data(make_config(path, tokenizer=folder, prefix=tmp_path / "q"))
    assert backend_of(tmp_path / "p") == "tokenizers"
    assert read_files(tmp_path / "p") == read_files(tmp_path / "q")


@pytest.mark.usefixtures("fake_gigatoken")
@pytest.mark.parametrize("line", [b'{"text": "a"', b'{"text": "\xc0"}', b'{"text": 1}', b'{"other": "a"}', b'"text"'])
def test_mistakes_of_the_input_are_named_alike_by_both_backends(tokenizer, tmp_path, line):
    path = write_lines(tmp_path / "c.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + line + b"\n")
    said = []
    for name in ("gigatoken", "tokenizers"):
        with pytest.raises(DataError) as caught:
            preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", backend=name))
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"{path}:{len(TEXTS) + 1}: ")


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_tokenizer_the_backend_refuses_is_encoded_without_it(tokenizer, monkeypatch):
    def refuse(*_: object) -> None:
        raise ValueError("unknown pre-tokenizer")

    monkeypatch.setitem(backend._LOADERS, "gigatoken", refuse)
    loaded = read_tokenizer(tokenizer)
    assert choose_backend("auto", loaded, []) == "tokenizers"
    with pytest.raises(DataError, match=r"gigatoken cannot be used with this tokenizer \(unknown pre-tokenizer\); use"):
        choose_backend("gigatoken", loaded, [])


def test_without_the_package_only_an_explicit_wish_is_refused(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    loaded = read_tokenizer(tokenizer)
    with caplog.at_level(logging.INFO):
        assert choose_backend("auto", loaded, []) == "tokenizers"
    assert "gigatoken is not installed" in caplog.text
    with pytest.raises(
        ConfigError, match="--backend: gigatoken is not installed; install it or use --backend tokenizers"
    ):
        choose_backend("gigatoken", loaded, [])


@pytest.mark.parametrize(
    ("single", "expected"),
    [("$A", ([], [])), ("[B] $A", ([1], [])), ("$A [E]", ([], [2])), ("[B] [B] $A [E]", ([1, 1], [2]))],
)
def test_affixes_are_what_the_post_processor_adds(single, expected):
    tokenizer = Tokenizer(models.BPE({"a": 0, "[B]": 1, "[E]": 2}, []))
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[B]", 1), ("[E]", 2)])
    assert find_affixes(tokenizer) == expected
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    encode = load_encoder("tokenizers", tokenizer.to_str(), np.dtype(np.uint16), find_affixes(tokenizer))
    assert [ids.tolist() for ids in encode(["a a", ""])] == [
        [*expected[0], 0, 0, *expected[1]],
        [*expected[0], *expected[1]],
    ]


@pytest.mark.parametrize(("dtype", "highest"), [("<u2", 65535), ("<i4", 2**31 - 1)])
def test_lists_of_ids_are_packed_alike_with_and_without_the_extension(monkeypatch, dtype, highest):
    if backend._csrc is None:
        pytest.skip("the C++ extension is not built")
    lists = ([], [0], [highest, 256, 257, 65499, 1, 0])
    packed = [pack_ids(ids, np.dtype(dtype)) for ids in lists]
    for wrong in ([highest + 1], [1, -1]):
        with pytest.raises(ValueError, match="pack_ids: an id that does not fit its type"):
            pack_ids(wrong, np.dtype(dtype))
    monkeypatch.setattr(backend, "_csrc", None)
    for ids, found in zip(lists, packed, strict=True):
        twin = pack_ids(ids, np.dtype(dtype))
        assert (found.dtype, found.tolist()) == (twin.dtype, ids)


def test_many_texts_are_encoded_in_their_order(tokenizer):
    library = read_tokenizer(tokenizer).tokenizer
    texts = [f"{at} {TEXTS[at % 7]}" for at in range(backend._GROUP_TEXTS * 3 + 1)]
    encode = load_encoder("tokenizers", library.to_str(), np.dtype(np.uint16), ([], []))
    assert [ids.tolist() for ids in encode(texts)] == [library.encode(text).ids for text in texts]


def test_the_first_difference_is_shown(tokenizer):
    library = read_tokenizer(tokenizer).tokenizer
    texts = ["the old language", "x" * 60]
    ids = [np.array(library.encode(text).ids) for text in texts]
    assert compare_ids(library, texts, ids) is None
    ids[1] = ids[1][:-1]
    last = library.encode("x").ids[-1]
    assert compare_ids(library, texts, ids) == (
        f"gigatoken gives other ids than tokenizers for {'x' * 40 + '...'!r}: [] instead of [{last}] at token 60"
    )

import json
from pathlib import Path

import pytest

from megatron_adapt.config import BuildTokenizer, MeasureTokenizer, SweepSettings, TokenizerSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.shape import read_shape
from megatron_adapt.tokenizer import extend, sweep
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.figures import TokenizerFigures, measure
from megatron_adapt.tokenizer.measure import measure_tokenizer
from megatron_adapt.tokenizer.sweep import count_row_cost, describe_sweep, sweep_sizes
from tests.tokenizer.bases import make_texts, write_corpus

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 10,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "vocab_size": 100,
}


def make_shape(**changes):
    return read_shape({**CONFIG, **changes}, "config.json")


def make_figures(tokens, size=1000):
    return TokenizerFigures(1, size, size, 1, tokens, 0, 0, tokens / size, 0, 0, 0, 0)


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("tokenizer*")}


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "ru.jsonl", make_texts("ru", 200))


# ---------------------------------------------------------------- what is built


def test_every_size_is_the_tokenizer_that_a_build_of_that_size_writes(base, corpus, tmp_path):
    seen = {}

    def look(tokenizer, name):
        seen[name] = read_files(tokenizer.folder)
        return {"ru": measure(tokenizer, make_texts("ru", 20))}

    settings = SweepSettings(sweep=(5, 20, 40), base=base.folder, corpus=(corpus,), scripts=("Cyrillic",))
    found = sweep_sizes(settings, "text", look)
    assert list(seen) == ["base", "extend5", "extend20", "extend40"]
    assert [item.rows for item in found.sizes] == [0, 21, 84, 168]
    for size in settings.sweep:
        output = tmp_path / f"{size}"
        build_tokenizer(
            BuildTokenizer(
                base=base.folder,
                corpus=(corpus,),
                output=output,
                settings=TokenizerSettings(size=f"extend{size}", scripts=("Cyrillic",)),
            )
        )
        assert seen[f"extend{size}"] == read_files(output)


def test_a_size_without_its_unreachable_pieces_is_learned_again(bases, corpus, tmp_path, monkeypatch):
    """Pieces come out unreachable in the smaller size only; it must not be cut from the larger one's list."""
    rounds = []

    def find(made, pieces):
        rounds.append(len(pieces))
        return set(pieces[3:5]) if len(rounds) == 1 else set()

    monkeypatch.setattr(extend, "find_unreachable", find)
    pieces = {}

    def look(tokenizer, name):
        ids = range(bases["sentencepiece"].vocab_size, tokenizer.vocab_size)
        pieces[name] = [tokenizer.tokenizer.id_to_token(index) for index in ids]
        return {"ru": make_figures(1)}

    settings = SweepSettings(sweep=(5, 20), base=bases["sentencepiece"].folder, corpus=(corpus,))
    sweep_sizes(settings, "text", look)
    assert rounds == [21, 21, 84]
    small, large = pieces["extend5"], pieces["extend20"]
    assert not set(large[3:5]) & set(small)
    assert (len(small), small[:3]) == (21, large[:3])


def test_a_corpus_is_learned_from_once(bases, corpus, monkeypatch):
    calls = []
    learn = sweep.learn_pieces
    monkeypatch.setattr(sweep, "learn_pieces", lambda *args: (calls.append(args[2]), learn(*args))[1])
    settings = SweepSettings(sweep=(5, 10, 30), base=bases["byte_level"].folder, corpus=(corpus,))
    sweep_sizes(settings, "text", lambda *_: {"ru": make_figures(1)})
    assert calls == [126]


# ---------------------------------------------------------------- what it says


def test_savings_and_costs_by_hand():
    tokens = {0: (100, 1000), 10: (110, 400), 30: (130, 300)}
    found = {size: (vocab, {"ru": make_figures(count)}) for size, (vocab, count) in tokens.items()}
    base, small, large = describe_sweep(Path("b"), found, make_shape()).sizes
    assert (base.rows, base.languages["ru"].saved, base.languages["ru"].flops_per_byte) == (0, 0, 1)
    assert small.languages["ru"].saved == pytest.approx(0.6)
    assert small.languages["ru"].saved_per_1000_rows == pytest.approx(60)
    assert large.languages["ru"].saved == pytest.approx(0.25)
    assert large.languages["ru"].saved_per_1000_rows == pytest.approx(12.5)
    assert large.languages["ru"].flops_per_byte == pytest.approx((1 + large.cost.flops_share) * 0.3)
    assert describe_sweep(Path("b"), found, None).sizes[1].cost is None


@pytest.mark.parametrize(
    ("tokens", "flat_at"),
    [
        ([1000, 400, 390, 388], 50),  # the last step saves 0.5 %
        ([1000, 400, 397, 300], 25),  # the first step below the limit counts
        ([1000, 400, 390, 380], None),
        ([1000, 999, 998, 997], 0),
        ([1000, 1001, 1001, 1001], 0),  # a language that gets longer
    ],
)
def test_the_gain_flattens_before_the_first_step_that_saves_less_than_a_hundredth(tokens, flat_at):
    sizes = [(0, 100), (25, 125), (50, 150), (75, 175)]
    found = {size: (vocab, {"ru": make_figures(count)}) for (size, vocab), count in zip(sizes, tokens, strict=True)}
    assert describe_sweep(Path("b"), found, None).flattens_at == {"ru": flat_at}


def test_the_rule_goes_by_rows_and_not_by_steps():
    # 1.5 % for 50 % of the vocabulary is too little; no rows at all, because the corpus gave no more, are flat.
    wide = {0: (100, 1000), 50: (150, 900), 100: (200, 886)}
    ended = {0: (100, 1000), 50: (150, 900), 100: (150, 900)}
    narrow = {0: (100, 1000), 50: (150, 900), 60: (160, 893)}
    for tokens, flat_at in ((wide, 50), (ended, 50), (narrow, None)):
        found = {size: (vocab, {"ru": make_figures(count)}) for size, (vocab, count) in tokens.items()}
        assert describe_sweep(Path("b"), found, None).flattens_at == {"ru": flat_at}


@pytest.mark.parametrize("tied", [False, True])
def test_costs_of_rows_by_hand(tied):
    # a block: 4 x 10 x 10 of attention, 3 x 10 x 20 of the feed-forward part, 2 x 10 of norms; one more norm at the end
    body, matrix = 2 * (400 + 600 + 20) + 10, 100 * 10
    cost = count_row_cost(make_shape(tie_word_embeddings=tied), 50)
    assert cost.parameters == (500 if tied else 1000)
    assert cost.parameters_share == pytest.approx(cost.parameters / (body + (1 if tied else 2) * matrix))
    assert cost.head_flops == 1000
    assert cost.flops_share == pytest.approx(1000 / (2 * (body + matrix)))


# ---------------------------------------------------------------- the tool


def test_the_tool_shows_and_writes_a_sweep(bases, corpus, tmp_path, capsys):
    english = write_corpus(tmp_path / "en.jsonl", make_texts("en", 30))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    settings = SweepSettings(
        sweep=(10, 20, 300),
        base=bases["sentencepiece"].folder,
        corpus=(corpus,),
        scripts=("Cyrillic",),
        model_shape=tmp_path / "model",
    )
    config = MeasureTokenizer(
        corpora=(f"en={english}", f"ru={corpus}"),
        json=tmp_path / "out.json",
        plot=tmp_path / "out.png",
        settings=settings,
    )
    assert measure_tokenizer(config) == {}
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == ["sweep"]
    assert written["sweep"]["flattens_at"]["en"] == 0
    sizes = written["sweep"]["sizes"]
    assert [item["size"] for item in sizes] == [0, 10, 20, 300]
    assert sizes[1]["cost"]["parameters"] == 2 * 10 * 42
    figures = [item["languages"]["ru"]["figures"]["tokens_per_byte"] for item in sizes]
    assert figures == sorted(figures, reverse=True)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert str(corpus) in json.loads((tmp_path / "out.stage.json").read_text())["inputs"]
    printed = capsys.readouterr().out
    assert (
        "The gain flattens (the next step saves less than 1% of the tokens for each 25% of the base's ids): " in printed
    )
    assert "en at the base, ru" in printed


def test_tokenizers_and_a_sweep_go_into_one_file(bases, corpus, tmp_path):
    folder = bases["byte_level"].folder
    config = MeasureTokenizer(
        tokenizers=(f"base={folder}",),
        corpora=(f"ru={corpus}",),
        json=tmp_path / "out.json",
        settings=SweepSettings(sweep=(10,), base=folder, corpus=(corpus,)),
    )
    measure_tokenizer(config)
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == ["base", "sweep"]
    assert written["base"]["ru"] == written["sweep"]["sizes"][0]["languages"]["ru"]["figures"]
    assert written["sweep"]["sizes"][1]["cost"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": (50, 25)}, r"--sweep: 50 25 are no rising per cents; use for example 25 50 75 100"),
        ({"sweep": (0, 25)}, r"--sweep: 0 25 are no rising"),
        ({"base": None}, r"--sweep: extends --base, and there is none; name its folder"),
        ({"corpus": ()}, r"--sweep: learns from --corpus, and there is none; name its files"),
        ({"sweep": ()}, r"--base: has no effect without --sweep; leave it out"),
        ({"sweep": (), "base": None, "corpus": (), "model_shape": Path("m")}, r"--model-shape: has no effect without"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SweepSettings(**{"sweep": (25,), "base": Path("b"), "corpus": (Path("c"),), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": (Path("gone.jsonl"),)}, r"--corpus: gone\.jsonl is not a file"),
        ({"model_shape": Path("gone")}, r"--model-shape: gone/config\.json is not a file"),
        ({"scripts": ("Arabic",)}, r"--corpus: 200 documents hold no new piece in Arabic"),
    ],
)
def test_inputs_that_are_missing_or_of_no_use_are_named(bases, corpus, changes, message):
    settings = SweepSettings(**{"sweep": (25,), "base": bases["byte_level"].folder, "corpus": (corpus,), **changes})
    with pytest.raises(DataError, match=message):
        sweep_sizes(settings, "text", lambda *_: {})

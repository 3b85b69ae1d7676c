"""Two loops over text, C++ against the Python they are twins of: counting words, and signing for near duplicates.

1. ``make_texts``: documents of an invented alphabet, or ``--corpus`` (JSON lines, also compressed).
2. ``check``: both give the same counts and signatures, or nothing is measured.
3. ``run_in_turns``: each goes through all texts once a round; the Python signature only through a fiftieth.

``python benchmarks/text_loops.py [--quick] [--size MB] [--corpus FILE]``
"""

import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import regex
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, make_timed, run_in_turns

from megatron_adapt.corpus.documents import limit_texts, read_texts
from megatron_adapt.corpus.duplicates import NUM_BINS, RUN_CHARACTERS, sign_text, sign_twin
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool
from megatron_adapt.tokenizer.runs import RunCounter

MB, QUICK_MB = 20.0, 2.0
ROUNDS, QUICK_ROUNDS = 5, 3
SIGNED_SHARE = 50
DOCUMENT_CHARACTERS = 3000
WANTED = regex.compile(r"\p{L}")


def make_texts(num_bytes: float, corpus: Path | None) -> list[str]:
    """Return texts of about ``num_bytes``: of the corpus, or of invented words in two scripts."""
    if corpus:
        return list(limit_texts(read_texts([corpus], "text"), int(num_bytes)))
    draw = random.Random(1)
    letters = ("abcdefghijklmnop", "абвгдежзиклмнопр")
    words = ["".join(draw.choices(draw.choice(letters), k=draw.randint(1, 10))) for _ in range(20_000)]
    texts, size = [], 0
    while size < num_bytes:
        text = " ".join(draw.choices(words, k=DOCUMENT_CHARACTERS // 6))
        texts.append(text)
        size += len(text.encode())
    return texts


def measure_case(case: str, texts: list[str], num_rounds: int) -> dict[str, object]:
    """Measure one of the loops."""
    counter = RunCounter(WANTED)
    share = SIGNED_SHARE if case == "sign" else 1
    few = texts[: max(1, len(texts) // share)]
    ours: Callable[[], object]
    twin: Callable[[], object]
    if case == "count":
        assert counter.count(few) == counter.count_python(few)
        ours, twin = (lambda: counter.count(texts)), (lambda: counter.count_python(few))
    else:
        assert all((sign_text(text) == sign_slowly(text)).all() for text in few[:3])
        ours, twin = (lambda: [sign_text(text) for text in texts]), (lambda: [sign_slowly(text) for text in few])
    seconds = run_in_turns({"twin": make_timed(twin), "ours": make_timed(ours)}, num_rounds)
    scale = sum(len(text.encode()) for text in texts) / sum(len(text.encode()) for text in few)
    seconds["twin"] = [value * scale for value in seconds["twin"]]
    total = sum(len(text.encode()) for text in texts) / 1e6
    best = {name: total / min(values) for name, values in seconds.items()}
    return {"case": case, "mb_per_second": best, "time_ratio": compare(seconds, "twin", "ours")}


def sign_slowly(text: str) -> object:
    """Sign a text by the Python twin."""
    reduced = regex.sub(r"[^\p{L}\p{M}\p{N}]+", "", text.lower())
    return sign_twin(reduced.encode("utf-32-le"), RUN_CHARACTERS, NUM_BINS)


def run(size: float, num_rounds: int, corpus: Path | None) -> None:
    """Measure both loops and print them.

    Raises:
        EngineError: the C++ extension is not built, so there is nothing to compare.
    """
    if find_spec("megatron_adapt._csrc") is None:
        raise EngineError("text_loops: megatron_adapt._csrc is not built; install the package with a C++ compiler")
    texts = make_texts(size * 1e6, corpus)
    figures = [measure_case(case, texts, num_rounds) for case in ("count", "sign")]
    print(f"{sum(len(text.encode()) for text in texts) / 1e6:.1f} MB of text, best round")
    print_table(
        ("loop", "twin MB/s", "ours MB/s", "time ratio (range)"),
        [(item["case"], *item["mb_per_second"].values(), show_ratio(item["time_ratio"])) for item in figures],
    )
    shared = {"mb": size, "real_text": corpus is not None, "rounds": num_rounds, "cases": figures}
    print_figures("text_loops", ("numpy", "regex"), shared)


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=MB, unit="MB of text")
    parser.add_argument("--corpus", type=Path, help="documents to read instead of the invented ones")
    arguments = parser.parse_args()
    quick = arguments.quick
    run_tool(
        run,
        arguments.size or (QUICK_MB if quick else MB),
        arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        arguments.corpus,
    )

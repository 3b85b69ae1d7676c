"""Learning pieces: our learner against its Python twin, and against BpeTrainer of ``tokenizers``.

1. ``write_corpus``: documents of an invented language, or ``--corpus`` (JSON lines, also compressed).
2. ``learn_base``: a small byte-level tokenizer from the first tenth of the text, which ours extends.
3. ``measure_twin``: C++ and Python on the same few words; equal results, or nothing is measured.
4. ``learn_ours`` and ``learn_theirs``: from the documents to as many new pieces as merges, each in a fresh process,
   in turns. Both read the same file in the same way and split words by the same expression.

The work is not quite the same: the peer starts from bytes, ours from the base's pieces, and asks of each candidate
whether it is whole characters that the base can reach. The peer uses all cores to count words, ours one.

``python benchmarks/merges.py [--quick] [--size MB] [--pieces N] [--corpus FILE]``
"""

import random
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import Measured, compare, make_timed, measure, run_fresh, run_in_turns
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from megatron_adapt.config import TokenizerSettings
from megatron_adapt.corpus.documents import DocumentWriter, limit_texts, read_texts
from megatron_adapt.errors import DataError, EngineError
from megatron_adapt.flags import run_tool
from megatron_adapt.tokenizer.extend import learn_pieces
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.learn import SPLIT_PATTERN, learn_base_tokenizer
from megatron_adapt.tokenizer.merges import learn_merges, learn_merges_python
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.tokenizer.words import count_words, segment_words

MB, QUICK_MB = 10.0, 2.0
NUM_PIECES, QUICK_PIECES = 8000, 2000
ROUNDS, QUICK_ROUNDS = 5, 3
BASE_PIECES = 512
TWIN_SHARE = 5
"The twin learns a fifth of the pieces on a fifth of the text."
NUM_WORDS, WORDS_PER_DOCUMENT = 60_000, 300
TEXT_KEY = "text"


def write_corpus(path: Path, texts: Iterator[str]) -> int:
    """Write documents; return the bytes of their text."""
    total = 0
    with DocumentWriter(path) as writer:
        for text in texts:
            writer.write({TEXT_KEY: text})
            total += len(text.encode())
    return total


def make_texts(seed: int) -> Iterator[str]:
    """Yield endless documents: words of syllables with endings, frequencies falling as in Zipf's law."""
    draw = random.Random(seed)
    syllables = [a + b + c for a in "bdgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s")]
    endings = ["", "", "a", "en", "ir", "osta", "umi"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) + draw.choice(endings) for _ in range(NUM_WORDS)]
    cumulated = list(accumulate(1 / rank for rank in range(1, NUM_WORDS + 1)))
    while True:
        chosen = draw.choices(words, cum_weights=cumulated, k=WORDS_PER_DOCUMENT)
        yield " ".join(chosen) + ".\n"


def learn_base(corpus: Path, num_bytes: int, output: Path) -> None:
    """Learn the base tokenizer from the first tenth of the text."""
    texts = limit_texts(read_texts([corpus], TEXT_KEY), num_bytes // 10)
    learn_base_tokenizer(texts, 258 + BASE_PIECES, "byte_level", output)


def learn_ours(corpus: Path, base_folder: Path, num_pieces: int) -> int:
    """Extend the base by pieces learned from the corpus; return how many there are."""
    base = read_tokenizer(base_folder)
    words = count_words(base, read_texts([corpus], TEXT_KEY), make_filter(()))
    return len(learn_pieces(base, words.counts, num_pieces, TokenizerSettings())[0])


def learn_theirs(corpus: Path, num_merges: int) -> int:
    """Learn merges with ``tokenizers``; return how many there are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + num_merges, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(read_texts([corpus], TEXT_KEY), trainer)
    return int(tokenizer.get_vocab_size()) - len(alphabet)


def measure_twin(corpus: Path, base_folder: Path, num_bytes: int, num_pieces: int, num_rounds: int) -> dict[str, Any]:
    """Measure the learner alone, C++ and Python, on the beginning of the text.

    Raises:
        EngineError: the two learn different pieces.
    """
    base = read_tokenizer(base_folder)
    texts = limit_texts(read_texts([corpus], TEXT_KEY), max(num_bytes // TWIN_SHARE, 1))
    counted = count_words(base, texts, make_filter(()))
    words = segment_words(base, counted.counts)
    arguments = words, max(num_pieces // TWIN_SHARE, 1), 2, _accept_all
    learned = learn_merges(*arguments)
    if learned != learn_merges_python(*arguments):
        raise EngineError("merges: C++ and Python learn different pieces; mend that before measuring")
    calls = {
        "twin": make_timed(lambda: learn_merges_python(*arguments)),
        "ours": make_timed(lambda: learn_merges(*arguments)),
    }
    seconds = run_in_turns(calls, num_rounds)
    return {
        "mb": counted.num_bytes / 1e6,
        "pieces": len(learned),
        "seconds": {name: median(values) for name, values in seconds.items()},
        "time_ratio": compare(seconds, "twin", "ours"),
    }


def _accept_all(_: bytes) -> bool:
    return True


def measure_learners(corpus: Path, base_folder: Path, num_pieces: int, num_rounds: int) -> dict[str, Any]:
    """Measure ours and ``tokenizers`` from documents to pieces, each in fresh processes."""
    found: dict[str, list[Measured]] = {"tokenizers": [], "ours": []}

    def learn(name: str) -> float:
        arguments = (learn_ours, corpus, base_folder) if name == "ours" else (learn_theirs, corpus)
        found[name].append(run_fresh(measure, *arguments, num_pieces))
        return found[name][-1].seconds

    seconds = run_in_turns({name: partial(learn, name) for name in found}, num_rounds)
    extra_mib = {name: median(item.extra_mib for item in items) for name, items in found.items()}
    return {
        "pieces": {name: items[0].result for name, items in found.items()},
        "seconds": {name: median(values) for name, values in seconds.items()},
        "time_ratio": compare(seconds, "tokenizers", "ours"),
        "extra_mib": extra_mib,
        "memory_ratio": extra_mib["tokenizers"] / extra_mib["ours"],
    }


def run(size_mb: float, num_pieces: int, num_rounds: int, source: Path | None, text_key: str) -> None:
    """Make the data, measure and print.

    Raises:
        DataError: ``source`` is damaged or does not give that many pieces.
        EngineError: the C++ extension is not built.
    """
    if find_spec("megatron_adapt._csrc") is None:
        raise EngineError("merges: megatron_adapt._csrc is not built; install the package with a C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        corpus, base_folder = Path(folder, "corpus.jsonl.zst"), Path(folder, "base")
        texts = read_texts([source], text_key) if source else make_texts(seed=0)
        num_bytes = write_corpus(corpus, limit_texts(texts, int(size_mb * 1e6)))
        learn_base(corpus, num_bytes, base_folder)
        twin = measure_twin(corpus, base_folder, num_bytes, num_pieces, num_rounds)
        learners = measure_learners(corpus, base_folder, num_pieces, num_rounds)
    if min(learners["pieces"].values()) < num_pieces:
        raise DataError(f"--pieces: the text gives {learners['pieces']} of {num_pieces}; lower --pieces or add text")
    kind = "of an invented language" if source is None else "of real text"
    print(f"Learning pieces from {num_bytes / 1e6:.3g} MB {kind}; ours on top of {258 + BASE_PIECES} base pieces")
    columns = ("what", "pieces", "peer s", "ours s", "time ratio (range)", "peer MiB", "ours MiB", "memory ratio")
    print_table(
        columns,
        [
            (
                f"learner alone, {twin['mb']:.2g} MB, Python twin",
                twin["pieces"],
                *twin["seconds"].values(),
                show_ratio(twin["time_ratio"]),
                *("-",) * 3,
            ),
            (
                "documents to pieces, BpeTrainer",
                num_pieces,
                *learners["seconds"].values(),
                show_ratio(learners["time_ratio"]),
                *learners["extra_mib"].values(),
                learners["memory_ratio"],
            ),
        ],
    )
    shared = {"mb": num_bytes / 1e6, "real_text": source is not None, "rounds": num_rounds}
    print_figures("merges", ("tokenizers", "numpy"), {**shared, "twin": twin, "learners": learners})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=MB, unit="MB of text")
    parser.add_argument("--pieces", type=int, help=f"pieces to learn ({NUM_PIECES})")
    parser.add_argument("--corpus", type=Path, help="documents to learn from instead of the invented language")
    parser.add_argument("--text-key", default=TEXT_KEY, help="key of the text in a document of --corpus")
    arguments = parser.parse_args()
    quick = arguments.quick
    run_tool(
        run,
        arguments.size or (QUICK_MB if quick else MB),
        arguments.pieces or (QUICK_PIECES if quick else NUM_PIECES),
        arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        arguments.corpus,
        arguments.text_key,
    )

"""Build tokenizers by several methods and compare fertility, drift of the old language, and agreement of readers.

Every corpus is split by ``tools/prepare_corpus.py``; tokenizers learn from the training parts. Fertility is measured
on the held-out parts, drift on every document of the old language, agreement on every document of all languages:
``tokenizer.json`` by ``tokenizers``, ``tokenizer.model`` by ``sentencepiece``, the folder by ``transformers``.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_adapt.corpus.documents import read_texts

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "ar": ["Arabic"],
    "hi": ["Devanagari"],
    "ja": ["Han", "Hiragana", "Katakana"],
    "ko": ["Hangul"],
    "ru": ["Cyrillic"],
}
VARIANTS = {
    "continue": ["--method", "continue"],
    "merge, scores below": ["--method", "merge"],
    "merge, scores zero": ["--method", "merge", "--scores", "zero"],
    "merge, scores learned": ["--method", "merge", "--scores", "learned"],
}
BATCH_TEXTS = 512


def run_tool(tool: str, *flags: object) -> None:
    """Run one of the project's tools; stop here if it fails."""
    subprocess.run([sys.executable, str(ROOT / "tools" / tool), *map(str, flags)], check=True)


def prepare(corpora: dict[str, Path], folder: Path) -> dict[str, list[Path]]:
    """Split every corpus into a training and a held-out file."""
    split = {}
    for language, path in corpora.items():
        target = folder / "corpus" / language
        if not (target / "stage.json").is_file():
            run_tool("prepare_corpus.py", "--input", path, "--output", target, "--valid-share", 0.05)
        split[language] = [target / "train-00000.jsonl.zst", target / "valid-00000.jsonl.zst"]
    return split


def build(base: Path, to: Path, language: str, corpus: Path, old: list[Path], flags: list[str]) -> float:
    """Build one tokenizer; return its seconds."""
    start = time.monotonic()
    if not (to / "stage.json").is_file():
        named = ["--base", base, "--corpus", corpus, "--output", to, "--size", "extend100", "--old-corpus", *old]
        run_tool("build_tokenizer.py", *named, "--scripts", *SCRIPTS[language], *flags)
    return time.monotonic() - start


def read_batches(paths: list[Path], max_bytes: int) -> Iterator[list[str]]:
    """Yield texts in batches, up to ``max_bytes``; 0 reads all."""
    texts, size = read_texts(paths, "text"), 0
    while batch := list(islice(texts, BATCH_TEXTS)):
        yield batch
        size += sum(len(text.encode()) for text in batch)
        if max_bytes and size >= max_bytes:
            return


def count_tokens_per_byte(folder: Path, path: Path) -> float:
    """Return tokens per byte of text, special tokens aside."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = size = 0
    for batch in read_batches([path], 0):
        tokens += sum(map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False)))
        size += sum(len(text.encode()) for text in batch)
    return tokens / size


def count_agreement(folder: Path, split: dict[str, list[Path]], max_bytes: int) -> tuple[int, int]:
    """Count the documents, and those that every reader of the folder cuts alike."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(folder)
    path = folder / "tokenizer.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path)) if path.is_file() else None
    documents = agreed = 0
    for paths in split.values():
        for batch in read_batches(paths, max_bytes):
            readings = [
                [item.ids for item in tokenizer.encode_batch_fast(batch, add_special_tokens=False)],
                loaded(batch, add_special_tokens=False)["input_ids"],
                *([model.encode(batch, num_threads=2)] if model else []),
            ]
            documents += len(batch)
            agreed += sum(all(item == first for item in others) for first, *others in zip(*readings, strict=True))
    return documents, agreed


def compare(args: argparse.Namespace) -> list[dict[str, object]]:
    """Build and measure everything; results are kept beside each tokenizer."""
    corpora = dict(pair.split("=", 1) for pair in args.corpora)
    split = prepare({language: Path(path) for language, path in corpora.items()}, args.work_dir)
    bases = {name: Path(path) for name, path in (pair.split("=", 1) for pair in args.bases)}
    made = args.work_dir / "byte_level_32k"
    if not (made / "stage.json").is_file():
        size = ["--vocab-size", args.byte_level_size, "--tokenizer-kind", "byte_level"]
        run_tool("create_base.py", "--corpus", split[args.old][0], "--output", made, *size)
    bases["byte_level_32k"] = made
    rows = []
    for base_name, base in bases.items():
        for language in (name for name in corpora if name in SCRIPTS and name != args.old):
            for variant, flags in VARIANTS.items():
                if "--scores" in flags and not (base / "tokenizer.model").is_file():
                    continue  # scores are SentencePiece's
                to = args.work_dir / base_name / language / variant.replace(", scores ", "_")
                seconds = build(base, to, language, split[language][0], split[args.old], flags)
                kept = to / "comparison.json"
                if not kept.is_file():
                    counts = json.loads((to / "stage.json").read_text())["counts"]
                    max_bytes = 0 if variant == "continue" else args.max_bytes
                    documents, agreed = count_agreement(to, split, max_bytes)
                    row = {
                        "base": base_name,
                        "language": language,
                        "variant": variant,
                        "pieces": counts["pieces_added"],
                        "seconds": round(seconds, 1),
                        "base_tokens_per_byte": count_tokens_per_byte(base, split[language][1]),
                        "tokens_per_byte": count_tokens_per_byte(to, split[language][1]),
                        "old_documents": counts["drift"]["documents"],
                        "old_changed": counts["drift"]["changed"],
                        "old_touched": counts["drift"]["touched"],
                        "documents": documents,
                        "agreed": agreed,
                    }
                    kept.write_text(json.dumps(row))
                rows.append(json.loads(kept.read_text()))
                print(format_row(rows[-1]), flush=True)
    return rows


def format_row(row: dict[str, object]) -> str:
    """Return a line of the Markdown table."""
    saved = 1 - row["tokens_per_byte"] / row["base_tokens_per_byte"]
    return (
        f"| {row['base']} | {row['language']} | {row['variant']} | {row['pieces']:,} "
        f"| {row['base_tokens_per_byte']:.4f} | {row['tokens_per_byte']:.4f} | -{saved:.1%} "
        f"| {row['old_changed']:,} (+ {row['old_touched'] - row['old_changed']:,}) of {row['old_documents']:,} "
        f"| {row['agreed'] / row['documents']:.2%} of {row['documents']:,} | {row['seconds']:.0f} s |"
    )


def main() -> None:
    """Read the flags, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", nargs="+", required=True, metavar="LANG=FILE", help="documents of each language")
    parser.add_argument("--old", default="en", help="the language the bases know")
    parser.add_argument("--bases", nargs="*", default=[], metavar="NAME=DIR", help="SentencePiece bases to extend")
    parser.add_argument("--byte-level-size", type=int, default=32000, help="size of the byte-level base made here")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "tokenizers", help="folder for everything")
    parser.add_argument(
        "--max-bytes", type=int, default=0, help="text per language for agreement of merge; continue reads all"
    )
    rows = compare(parser.parse_args())
    heads = "base language method pieces before after saved old-changed readers-agree time".split()
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    print("\n".join(map(format_row, rows)))


if __name__ == "__main__":
    main()

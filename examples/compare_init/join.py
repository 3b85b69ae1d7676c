"""Join comparisons of several seeds into one table and one picture for each language: means, and from least to most.

``python examples/compare_init/join.py runs/compare_init/1 runs/compare_init/2 runs/compare_init/3 --output FOLDER``
"""

import argparse
from pathlib import Path
from statistics import mean

from megatron_adapt.compare import draw_curves
from megatron_adapt.files import read_json
from megatron_adapt.flags import run_tool


def join(folders: list[Path], output: Path) -> None:
    """Print the table and write ``compare-LANGUAGE.png``."""
    runs = [read_json(folder / "compare.json") for folder in folders]
    languages = list(next(iter(runs[0].values()))["curve"][0]["bits_per_byte"])
    joined = {way: {"curve": average([run[way]["curve"] for run in runs], languages)} for way in runs[0]}
    ends = [(language, at) for language in languages for at in (0, -1)]
    last = next(iter(joined.values()))["curve"][-1]["tokens"]
    titles = [f"{language} {'at 0' if at == 0 else f'at {last:,}'}" for language, at in ends]
    print("| method | fill s | fill MiB | " + " | ".join(titles) + " |\n|---|--:|--:|" + "--:|" * len(titles))
    for way in runs[0]:
        cells = [f"{mean(run[way]['fill'][key] for run in runs):.0f}" for key in ("seconds", "peak_mib")]
        for language, at in ends:
            bits = [run[way]["curve"][at]["bits_per_byte"][language] for run in runs]
            cells.append(f"{mean(bits):.4f} ({min(bits):.3f}-{max(bits):.3f})")
        print(f"| `{way}` | " + " | ".join(cells) + " |")
    for language in languages:
        draw_curves(output / f"compare-{language}.png", joined, language)


def average(curves: list[list[dict]], languages: list[str]) -> list[dict]:
    """Return the mean of curves point by point."""
    return [
        {
            "tokens": points[0]["tokens"],
            "bits_per_byte": {name: mean(point["bits_per_byte"][name] for point in points) for name in languages},
        }
        for points in zip(*curves, strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders of tools/compare_init.py, one for each seed")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    arguments = parser.parse_args()
    run_tool(join, arguments.folders, arguments.output)

"""The rules of the house that a program can check: arrows, fences, sizes.

A module of the package imports only from a lower row or its own part; torch, tyro and megatron stay where they
belong; imports of other parts stand at the top of a file; files and functions stay short. A breach is reported as
``file:line`` with both names.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron_adapt"
ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_TOOL_LINES = 30

# From the lowest row up. A part is a module or a folder directly in the package.
ROWS = (
    {"errors"},
    {"shape", "config", "files", "scripts", "_csrc"},
    {"logs", "parallelism", "plots", "recipe"},
    {"flags", "run_folder"},
    {"corpus", "engine"},
    {"tokenizer"},
    {"checkpoint"},
    {"evaluate", "data", "vocab", "scratch"},
    {"train", "export"},
    {"commands"},
    {"pipeline"},
    {"compare"},
)
ROW_OF = {part: at for at, row in enumerate(ROWS) for part in row}
FENCES = {
    "tyro": {"flags"},
    "megatron": {"engine", "checkpoint", "data", "train"},
    "torch": {"engine", "checkpoint", "evaluate", "data", "vocab", "scratch", "train", "export"},
}


def get_part(path: Path, root: Path) -> str:
    """Return the part of the package a file belongs to; '' for the package's own ``__init__``."""
    first = path.relative_to(root / PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def find_imports(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Yield every imported name of a file, dotted and absolute, whatever function or branch it hides in."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield node, ".".join([*base, alias.name])


def check_imports(path: Path, root: Path) -> Iterator[str]:
    """Yield what is wrong with the imports of one file of the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here = get_part(path, root)
    name = path.relative_to(root)
    if here and here not in ROW_OF:
        yield f"{name}:1: {here} has no row; add it to ROWS"
        return
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {node for function in functions for node in ast.walk(function)}
    for node, imported in find_imports(tree, path, root):
        parts = imported.split(".")
        where = f"{name}:{node.lineno}"
        if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in ROW_OF:
            if not here or parts[1] == here:
                continue
            if node in late:
                yield f"{where}: {here} imports {parts[1]} inside a function"
            if ROW_OF[parts[1]] >= ROW_OF[here]:
                yield f"{where}: {here} imports {parts[1]}, which is not in a lower row"
        elif parts[0] in FENCES and here not in FENCES[parts[0]]:
            yield f"{where}: {here} imports {parts[0]}, which is fenced off from it"


def check_sizes(path: Path, root: Path) -> Iterator[str]:
    """Yield files and functions that are too long."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(root)
    num_lines = len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{name}:1: {num_lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"


def list_sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_modules_import_only_from_lower_rows_and_inside_the_fences():
    sources = list_sources(PACKAGE)
    assert len(sources) > 10
    assert [breach for path in sources for breach in check_imports(path, ROOT)] == []


def test_files_and_functions_are_short():
    sources = list_sources(PACKAGE, "tools", "tests", "examples", "benchmarks")
    assert [breach for path in sources for breach in check_sizes(path, ROOT)] == []


@pytest.mark.parametrize("tool", list_sources("tools"), ids=lambda path: path.name)
def test_tools_are_thin_and_import_their_stage_late(tool):
    text = tool.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_TOOL_LINES
    tree = ast.parse(text)
    early = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert early <= {f"{PACKAGE}.config", f"{PACKAGE}.flags", "pathlib", "typing"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


# ---------------------------------------------------------------- the checker itself


@pytest.mark.parametrize(
    ("file", "code", "breach"),
    [
        ("corpus/a.py", "import os\nfrom megatron_adapt.data import index", "corpus/a.py:2: corpus imports data"),
        ("corpus/a.py", "import megatron_adapt.engine.cpu", "corpus/a.py:1: corpus imports engine"),
        ("corpus/a.py", "from megatron_adapt import vocab", "corpus/a.py:1: corpus imports vocab"),
        ("corpus/a.py", "from ..train import loop", "corpus/a.py:1: corpus imports train"),
        ("config.py", "from megatron_adapt.flags import run_tool", "config.py:1: config imports flags"),
        ("corpus/a.py", "if True:\n    import torch.nn", "corpus/a.py:2: corpus imports torch"),
        ("vocab/a.py", "from megatron.core import mpu", "vocab/a.py:1: vocab imports megatron"),
        ("train/a.py", "import tyro", "train/a.py:1: train imports tyro"),
        (
            "data/a.py",
            "def f():\n    from megatron_adapt.corpus import documents",
            "data/a.py:2: data imports corpus inside a function",
        ),
        ("utils.py", "", "utils.py:1: utils has no row"),
    ],
)
def test_the_checker_reports_the_place_and_both_names(tmp_path, file, code, breach):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    (found,) = check_imports(path, tmp_path)
    assert found.startswith(f"{PACKAGE}/{breach}")


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("data/a.py", "from megatron_adapt.corpus import documents\nfrom megatron.core import mpu\nimport torch"),
        ("data/a.py", "from megatron_adapt.data.index import read\nfrom . import blend\nfrom .index import read"),
        ("corpus/a.py", "import megatron_adapt\nfrom megatron_adapt import __version__\nimport torchvision"),
        ("data/a.py", "try:\n    from megatron_adapt import _csrc\nexcept ImportError:\n    _csrc = None"),
        ("logs.py", "def f():\n    from rich.console import Console"),
    ],
)
def test_the_checker_accepts_what_is_allowed(tmp_path, file, code):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert list(check_imports(path, tmp_path)) == []


def test_the_checker_reports_long_files_and_functions(tmp_path):
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    path = tmp_path / "long.py"
    path.write_text("import os\n\ndef f():\n" + body + "\n" * MAX_FILE_LINES)
    first, second = check_sizes(path, tmp_path)
    assert first.startswith("long.py:1: ")
    assert second == f"long.py:3: f has {MAX_FUNCTION_LINES + 1} lines, more than {MAX_FUNCTION_LINES}"

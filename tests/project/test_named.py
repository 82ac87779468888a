"""Files, modules and functions that the documents and the docstrings name exist."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("iskd", "tests", "docs", "benchmarks", "experiments")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += [*sorted((ROOT / "benchmarks").glob("*.md")), *sorted((ROOT / "experiments").glob("*/README.md"))]
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
KNOWN = {path.name for path in SOURCES} | {"train.py"}
NO_MODULES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("iskd.*")}  # such as iskd.sbatch

PATH = re.compile(r"(?<![\w./-])(?:iskd|conf|tests|docs|benchmarks|experiments)/[\w/-]+(?:\.\w+)*")
FILE = re.compile(r"(?<![\w./-])\w+\.py\b")
DOTTED = re.compile(r"(?<![\w./@-])iskd(?:\.[A-Za-z_]\w*)+")
PLACEHOLDER = re.compile(r"/(?:mine|[A-Z]+)\b")
MADE = {"modeling_iskd.py"}
"""Written by iskd into its users' folders."""
OTHERS = {"convert_hf_to_gguf.py"}
"""Programs of others, by the names they have there: llama.cpp's converter."""


def missing(text: str) -> list[str]:
    """What a text names of this repository that is not there; `mine` and capitals stand for what somebody adds."""
    wrong = [path for path in PATH.findall(text) if not ((ROOT / path).exists() or PLACEHOLDER.search(path))]
    wrong += [name for name in FILE.findall(text) if name not in KNOWN | MADE | OTHERS]
    return wrong + [name for name in DOTTED.findall(text) if name not in NO_MODULES and not resolves(name)]


@cache
def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    words = dotted.split(".")
    for end in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:end]))
        except ModuleNotFoundError:
            continue
        for word in words[end:]:
            if not hasattr(found, word) and word not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, word, None)
        return True
    return False


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_documents_name_what_is_there(file: Path) -> None:
    assert not missing(file.read_text(encoding="utf-8"))


def test_docstrings_name_what_is_there() -> None:
    wrong = {}
    for file in SOURCES:
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
        if lost := missing("\n".join(texts)):
            wrong[file.relative_to(ROOT).as_posix()] = lost
    assert not wrong


@pytest.mark.parametrize(
    "text", ["iskd/gone.py", "see `gone.py`", "iskd.plan.gone", "iskd.gone.Record", "tests/x/y.py"]
)
def test_what_is_gone_is_found(text: str) -> None:
    assert missing(text)


@pytest.mark.parametrize(
    "text", ["iskd/plan", "iskd.load", "iskd.plan.Record.edits", "tests/ROOM/", "iskd/importance/mine.py", "a/b.py"]
)
def test_what_is_there_is_not(text: str) -> None:
    assert not missing(text)

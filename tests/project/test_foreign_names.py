"""Private names of other libraries: CONTRIBUTING.md lists every one that the package leans on, and every patch."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "iskd"
PATCHES = "system/patches.py"
# Names of this form that their libraries document, or that are no names: a label, the end of a key.
PUBLIC = {"_target_", "_recursive_", "_self_", "_nolegend_", "_token_id", "_seconds", "_tokens", "_backward", "_exit"}
LIBRARIES = ("torch", "transformers", "lightning", "lm-eval", "huggingface_hub")


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and not name.startswith("__") and name not in PUBLIC


def private_attributes(tree: ast.Module) -> Iterator[str]:
    """Private names that are read or written with a dot or given as text, and those that imports take from others."""
    pieces = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in pieces:
            yield node.value
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "iskd":
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)


def defined(tree: ast.Module) -> set[str]:
    """Names that a file makes itself: functions, classes, variables, attributes of self and cls."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id in ("self", "cls") else set()
    return found


def files_imported(tree: ast.Module) -> Iterator[Path]:
    """Files of the package that a file imports or takes names from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "iskd":
            for name in (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)):
                path = ROOT / (name.replace(".", "/") + ".py")
                if path.is_file():
                    yield path


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def defined_in(path: Path) -> set[str]:
    return defined(tree_of(path))


def foreign_names(tree: ast.Module) -> set[str]:
    """Private names in a file that neither it nor a file that it imports from has made: they are another library's."""
    own = defined(tree).union(*(defined_in(path) for path in files_imported(tree)))
    return {name for name in private_attributes(tree) if is_private(name) and name not in own}


def rows(first: str) -> list[list[str]]:
    """The cells of the table of CONTRIBUTING.md whose first column is called so."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.search(rf"^\| {first} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, f"CONTRIBUTING.md has no table of {first}"
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in table[1].splitlines()]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_private_name_of_another_library_is_listed() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    used = {(name, file) for file, path in files.items() for name in foreign_names(tree_of(path)) if file != PATCHES}
    told = [(name, file) for row in rows("private name") for name in quoted(row[0]) for file in quoted(row[1])]
    assert len(told) == len(set(told)), "listed twice"
    assert not used - set(told), f"not in CONTRIBUTING.md: {sorted(used - set(told))}"
    assert not set(told) - used, f"in CONTRIBUTING.md without use: {sorted(set(told) - used)}"


def test_every_patch_is_listed() -> None:
    tree = tree_of(PACKAGE / PATCHES)
    public = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not is_private(node.name)}
    table = rows("patch")
    assert {name for row in table for name in quoted(row[0])} == public
    assert foreign_names(tree) <= {name for row in table for name in quoted(row[1])}


@pytest.mark.parametrize("table", ["private name", "patch"])
def test_a_row_says_why_and_what_it_was_tried_on(table: str) -> None:
    for name, where, why, tried in rows(table):
        assert quoted(name), name
        assert quoted(where), name
        assert len(why) > 10, name
        assert re.fullmatch(rf"({'|'.join(LIBRARIES)})( \d+\.\d+\.\d+,?)+", tried), (name, tried)


def test_no_other_file_puts_something_in_the_place_of_a_librarys_own() -> None:
    """No assignment to an attribute of what was imported from elsewhere."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        bound = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
            not in ("iskd", *sys.stdlib_module_names)
        }
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                target: ast.expr = node
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                target = node.args[0]
            else:
                continue
            while isinstance(target, ast.Attribute):
                target = target.value
            if isinstance(target, ast.Name) and target.id in bound and path != PACKAGE / PATCHES:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, f"patches belong into iskd/{PATCHES}: {wrong}"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\ntorch._C.f()", {"_C"}),
        ("from torch.nn import _reduction", {"_reduction"}),
        ("import torch._dynamo", {"_dynamo"}),
        ("from torch.nn import _a as b", {"_a"}),
        ("hasattr(state, '_is_root')", {"_is_root"}),
        ("vars(loop)['_ask'] = None", {"_ask"}),
        ("class A(B):\n  def f(self): return self._theirs", {"_theirs"}),
        ("class A:\n  def f(self, other):\n    self._mine = other._mine", set()),
        ("def _f(): ...\nx._f()\ng(f'_{x}', f'{x}_y', x.__dict__, '_target_', '_')", set()),
        ("from iskd.models.capture import Trace\nTrace()._calls", set()),
    ],
)
def test_the_search_finds_names_of_others_and_leaves_our_own(code: str, found: set[str]) -> None:
    assert foreign_names(ast.parse(code)) == found

"""One file that opens a student where iskd is not installed, made of iskd's own source (`export.code=bundle`).

Imports are followed from the class that opens a student (`iskd.export.bundled`) and from the classes that its record
names, definition by definition: the file holds what those need and nothing else, word for word. Annotations stay text
and need nothing. Where two modules define one name, the later one's has its module's name in front. A module that is
used by its name (`surgery.apply`) becomes a namespace of what is used of it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import cast

from iskd.plan import Convert, Record, Replace
from iskd.plan.edits import allowed

ROOT = ("iskd.export.bundled", "BundledForCausalLM")
PACKAGES = ("torch", "transformers")
"""What has to be installed beside Python itself."""
# Methods of a part that make a student, which nobody calls who opens one.
_LEFT_OUT = ("fit",)
_HEAD = '''# SPDX-License-Identifier: Apache-2.0
# Copyright The iskd authors. Licensed under the Apache License, Version 2.0.
# Made by iskd {version} from its own source, for the parts of one student: a change belongs there.
"""What transformers needs to open this student: AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).

It imports torch and transformers only. Parts of the student: {parts}.
"""

from __future__ import annotations
'''


@dataclass
class _Module:
    """A module's source: its statements by the names that they define, and what its imports bring."""

    name: str
    lines: list[str]
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    @classmethod
    @cache
    def of(cls, name: str) -> _Module:
        """Read a module once; it is not run."""
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise ValueError(f"{name} has no source that could be written beside the student: set export.code=iskd")
        text = Path(spec.origin).read_text(encoding="utf-8")
        found = cls(name, text.splitlines())
        for statement in ast.parse(text).body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                found.imported |= _brought(statement, spec.parent or "")
            else:
                found.defined |= dict.fromkeys(_bound(statement), statement)
        return found

    def text_of(self, statement: ast.stmt) -> str:
        """A statement's own text, with the comment above it; of a class without the methods that are left out."""
        first = _first_line(statement)
        while first > 1 and self.lines[first - 2].startswith("#"):
            first -= 1
        gone = {
            number
            for inner in (statement.body if isinstance(statement, ast.ClassDef) else ())
            if isinstance(inner, ast.FunctionDef) and inner.name in _LEFT_OUT
            for number in range(_first_line(inner) - 1, (inner.end_lineno or 0) + 1)  # with the blank line above
        }
        last = (statement.end_lineno or first) + 1
        return "\n".join(self.lines[number - 1] for number in range(first, last) if number not in gone)


def _first_line(statement: ast.stmt) -> int:
    return min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", ()))])


def _brought(statement: ast.Import | ast.ImportFrom, package: str) -> dict[str, tuple[str, str | None]]:
    """By the name it has here: the module that an import names, and what it takes from it (None = itself)."""
    if isinstance(statement, ast.Import):
        return {alias.asname or alias.name: (alias.name, None) for alias in statement.names}
    base = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
    return {alias.asname or alias.name: (base, alias.name) for alias in statement.names}


def _bound(statement: ast.stmt) -> list[str]:
    """Names that a statement of a module defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _read(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Names that code reads, each with the attribute that is asked of it; annotations are never run."""
    for key, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            left_out = isinstance(child, ast.FunctionDef) and isinstance(node, ast.ClassDef) and child.name in _LEFT_OUT
            if key in ("annotation", "returns") or left_out:
                continue
            if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name):
                yield child.value.id, child.attr
            elif isinstance(child, ast.Name):
                yield child.id, None
            elif isinstance(child, ast.AST):
                yield from _read(child)


class _Bundle:
    """The definitions that some names need.

    Attributes:
        kept: statements by module and the names that they define.
        outside: by the name it has in code, the other package's module and what is taken from it (None = itself).
        links: by module and a name that it imports: the module that defines it, and its name there.
        spaces: by the name of a module in code: that module and what is used of it.
    """

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, ast.stmt]] = {}
        self.outside: dict[str, tuple[str, str | None]] = {}
        self.links: dict[tuple[str, str], tuple[str, str]] = {}
        self.spaces: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {}
        self.modules: dict[str, _Module] = {}
        self._own = {"iskd", *(prefix.partition(".")[0] for prefix in allowed())}

    def need(self, module: str, name: str) -> tuple[str, str]:
        """Keep what `module` calls `name`, with all that it needs; returns the module that defines it, and its name."""
        source = self.modules.setdefault(module, _Module.of(module))
        if name not in source.defined:
            if name not in source.imported:
                raise ValueError(f"{module} defines no {name} that could be written beside the student")
            base, original = source.imported[name]
            return self.need(base, original or name)
        statement, kept = source.defined[name], self.kept.setdefault(module, {})
        if name not in kept:
            kept |= dict.fromkeys(_bound(statement), statement)
            for each, attribute in _read(statement):
                if each in source.defined:
                    self.need(module, each)
                elif each in source.imported:
                    self._follow(module, each, attribute, *source.imported[each])
            for node in ast.walk(statement):  # annotations too: a reader looks their names up
                base, original = source.imported.get(node.id if isinstance(node, ast.Name) else "", ("", None))
                if _is_outside(base):
                    self._take(cast(ast.Name, node).id, base, original)
        return module, name

    def _follow(self, module: str, name: str, attribute: str | None, base: str, original: str | None) -> None:
        """Keep what a name that `module` imports stands for."""
        if base.partition(".")[0] not in self._own:
            if not _is_outside(base):
                raise ValueError(
                    f"{module} needs {base}, and code beside a student may need {', '.join(PACKAGES)} only: set "
                    "export.code=iskd"
                )
            self._take(name, base, original)
        elif original is not None and _is_module(f"{base}.{original}"):
            if attribute is None:
                raise ValueError(f"{module} hands on the module {base}.{original}: set export.code=iskd")
            inner, used = self.spaces.setdefault(name, (f"{base}.{original}", {}))
            if inner != f"{base}.{original}":
                raise ValueError(
                    f"{module} calls {base}.{original} {name}, as another module calls {inner}: rename one"
                )
            used[attribute] = self.need(inner, attribute)
        else:
            self.links[module, name] = self.need(base, original or name)

    def _take(self, name: str, base: str, original: str | None) -> None:
        if self.outside.setdefault(name, (base, original)) != (base, original):
            raise ValueError(
                f"{name} is {base}.{original} in one module and {self.outside[name]} in another: rename one"
            )

    def names(self) -> dict[tuple[str, str], str]:
        """What every definition is called in the file, by its module and name."""
        taken, found = {*self.outside, *self.spaces}, {}
        for module, kept in self.kept.items():
            for name in kept:
                free = name if name not in taken else f"{module.rpartition('.')[2]}_{name.strip('_')}"
                taken.add(free)
                found[module, name] = free
        return found

    def text(self) -> str:
        """The imports and the definitions, in an order in which Python can run them."""
        names, order = self.names(), self._order()
        parts = []
        for module in order:
            renamed = {name: names[module, name] for name in self.kept[module]}
            renamed |= {name: names[link] for (where, name), link in self.links.items() if where == module}
            source = self.modules[module]
            statements = [each for name, each in source.defined.items() if name in self.kept[module]]
            parts.append(f"# --- {module}")
            parts += [_renamed(source.text_of(each), each, renamed, module) for each in dict.fromkeys(statements)]
            for space, (_, used) in self.spaces.items():
                if module == max((where for where, _ in used.values()), key=order.index):
                    listed = ", ".join(f"{key}={names[link]}" for key, link in sorted(used.items()))
                    parts.append(f"{space} = SimpleNamespace({listed})")
        return "\n\n\n".join([_imports(self.outside), *parts])

    def _order(self) -> list[str]:
        """Modules after those that they import from."""
        found: dict[str, None] = {}
        seen = set[str]()

        def visit(module: str) -> None:
            if module not in self.modules or module in seen:
                return
            seen.add(module)
            for base, original in self.modules[module].imported.values():
                visit(base)
                visit(f"{base}.{original}")
            if module in self.kept:
                found[module] = None

        for module in self.kept:
            visit(module)
        return list(found)


def _is_outside(module: str) -> bool:
    """Whether an import is one of Python's own or of the packages that have to be there."""
    top = module.partition(".")[0]
    return top in PACKAGES or top in sys.stdlib_module_names


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what stands before the last dot is no package
        return False


def _imports(outside: Mapping[str, tuple[str, str | None]]) -> str:
    taken: dict[str, list[str]] = {}
    plain = []
    for name, (base, original) in sorted(outside.items()):
        renamed = "" if name == (original or base) else f" as {name}"
        if original is None:
            plain.append(f"import {base}{renamed}")
        else:
            taken.setdefault(base, []).append(f"{original}{renamed}")
    return "\n".join([*plain, *(f"from {base} import {', '.join(names)}" for base, names in sorted(taken.items()))])


def _renamed(text: str, statement: ast.stmt, names: Mapping[str, str], module: str) -> str:
    """The text of a statement with other names, none of which it may also give to something of its own."""
    others = {name: new for name, new in names.items() if new != name and re.search(rf"(?<![\w./]){name}\b", text)}
    local = {node.arg for node in ast.walk(statement) if isinstance(node, (ast.arg, ast.keyword))}
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        local |= {name for each in statement.body for name in _bound(each)}
    if both := sorted(others.keys() & local):
        raise ValueError(f"{module}: {both[0]} is a definition of two modules and a name of this one's own: rename it")
    for name, new in others.items():
        text = re.sub(rf"(?<![\w./]){name}\b", new, text)
    return text


def bundled(record: Record, version: str) -> str:
    """The file for students of this record.

    Raises:
        ValueError: a part's source is not there, or needs a package that would have to be installed.
    """
    targets = dict.fromkeys(
        edit.block.target if isinstance(edit, Replace) else edit.mixer.target
        for edit in record.edits
        if isinstance(edit, (Replace, Convert))
    )
    bundle = _Bundle()
    for module, name in (ROOT, *(target.rpartition(".")[::2] for target in targets)):
        bundle.need(module, name)
    bundle.outside["SimpleNamespace"] = ("types", "SimpleNamespace")
    names = bundle.names()
    filled = "".join(f"    {target!r}: {names[bundle.need(*target.rpartition('.')[::2])]},\n" for target in targets)
    head = _HEAD.format(version=version, parts=", ".join(target.rpartition(".")[2] for target in targets))
    return f"{head}\n{bundle.text()}\n\n\nPARTS |= {{\n{filled}}}\nIskdForCausalLM = {ROOT[1]}\n"

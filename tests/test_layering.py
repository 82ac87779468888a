"""The arrows of the layout, read off the source: who may import whom, and who may know which library."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "iskd"
FILES = [*sorted(PACKAGE.rglob("*.py")), *sorted(ROOT.glob("train.py"))]
MAX_LINES = 400

KINDS = {"blocks", "mixers", "importance", "losses", "schedules"}
PARTS = 3
# A file may import its own level and those below. One without a level here has that of the highest file it imports.
LEVELS = {
    "plan": 0,
    "signals": 0,
    "tokenizer": 0,
    "arch": 1,
    "hosting": 1,
    "options": 0,
    "families": 1,
    "surgery": 2,
    "capture": 2,
    **dict.fromkeys(KINDS, PARTS),
    "module": 4,
    "data": 4,
    "callback": 4,
    "distributed": 4,
    "checkpoint": 4,
    "checkpoint_io": 4,
    "teachers": 4,
    "evaluate": 4,
    "export": 4,
    "run": 5,
    "build": 6,
    "cli": 7,
    "train": 7,
}
LIBRARIES = {
    "hydra": {"build", "cli", "train"},
    "omegaconf": {"build", "cli", "train"},
    "lightning": {"module", "data", "callback", "checkpoint", "checkpoint_io", "progress", "distributed", "run"}
    | {"parts", "finish", "tracking_wandb"},
}
# Names inside transformers' models. A part's own attribute of such a name (self.q_proj) is its own business.
FOREIGN = {"self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "input_layernorm", "embed_tokens", "wte"}
FOREIGN_PATHS = {("model", "layers"), ("transformer", "h"), ("model", "norm"), ("transformer", "ln_f")}
# Folders of one machine; spelt so that this file does not contain what it forbids.
MACHINE_PATH = re.compile(r"(?<![\w.~$}{)*/-])/(?:work|tmp|root|home|Users|mnt|scratch|data|var)" + r"/\w")
TEXT = {".py", ".yaml", ".yml", ".toml", ".md", ".cfg", ".sh", ".txt", ".lock", ".json", ".ipynb", ""}


def name_of(path: Path) -> str:
    """Dotted name below iskd: `plan`, `blocks.slim`; `blocks` for blocks/__init__.py, empty for iskd itself."""
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def family(name: str) -> str:
    """The name that `LEVELS` and `LIBRARIES` use: build and build_losses are one, as are all of blocks."""
    head = name.split(".")[0]
    return "build" if head.startswith("build") else head


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def dotted_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported dotted name with its line, except those for type checkers alone."""
    skipped = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree(path)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write the import from iskd, not relative"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


NAMES = {name_of(path): path for path in FILES}


@cache
def iskd_imports(path: Path) -> list[tuple[str, int]]:
    """Imported modules of iskd with their line; `from iskd.plan import Edit` is the module plan."""
    found = []
    for dotted, line in dotted_imports(path):
        parts = dotted.split(".")
        if parts[0] != "iskd":
            continue
        while len(parts) > 1 and ".".join(parts[1:]) not in NAMES:
            parts.pop()
        if len(parts) > 1 and NAMES[".".join(parts[1:])] != path:
            found.append((".".join(parts[1:]), line))
    return found


@cache
def level(name: str) -> int:
    """Of a file; where imports form a cycle, another test names it."""
    listed = LEVELS.get(family(name))
    return max((level(other) for other, _ in iskd_imports(NAMES[name])), default=0) if listed is None else listed


def parts() -> set[str]:
    """Modules that the configuration names, except base.py; all others of a folder are what its parts share."""
    mention = re.compile(rf"\biskd\.((?:{'|'.join(sorted(KINDS))})\.\w+)\.\w+")
    named = {name for path in (ROOT / "conf").rglob("*.yaml") for name in mention.findall(path.read_text("utf-8"))}
    return {name for name in named if not name.endswith(".base")}


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_imports_point_one_way() -> None:
    wrong = [
        f"{at(path, line)} imports {other}, which is above it"
        for name, path in NAMES.items()
        for other, line in iskd_imports(path)
        if level(other) > level(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle() -> None:
    graph = {name: sorted({other for other, _ in iskd_imports(path)}) for name, path in NAMES.items()}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in finished:
            for other in graph[name]:
                visit(other, (*trail, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def test_parts_of_one_kind_do_not_import_each_other() -> None:
    configured = parts()
    wrong = [
        f"{at(path, line)}: move what {name} and {other} share into {family(name)}/base.py"
        for name, path in NAMES.items()
        for other, line in iskd_imports(path)
        if family(other) == family(name) and other in configured
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_library_is_known_only_where_it_belongs(library: str) -> None:
    wrong = [
        f"{at(path, line)} imports {dotted}"
        for name, path in NAMES.items()
        for dotted, line in dotted_imports(path)
        if dotted.split(".")[0].removeprefix("pytorch_") == library and family(name) not in LIBRARIES[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_arch_knows_the_attribute_paths_of_transformers() -> None:
    wrong = []
    for name, path in NAMES.items():
        for node in ast.walk(tree(path)) if family(name) not in {"arch", "families"} else ():
            if not isinstance(node, ast.Attribute) or (isinstance(node.value, ast.Name) and node.value.id == "self"):
                continue
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else None
            if node.attr in FOREIGN or (owner, node.attr) in FOREIGN_PATHS:
                wrong.append(f"{at(path, node.lineno)}: .{node.attr} belongs into arch.py")
    assert not wrong, "\n".join(wrong)


def test_a_file_holds_one_idea() -> None:
    sizes = {name: path.read_text(encoding="utf-8").count("\n") for name, path in NAMES.items()}
    assert not {name: lines for name, lines in sizes.items() if lines > MAX_LINES}


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_file_names_a_folder_of_one_machine() -> None:
    wrong = []
    for path in tracked_files():
        if path.suffix in TEXT and path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            wrong += [at(path, number) for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert not wrong, "absolute paths in: " + ", ".join(wrong)

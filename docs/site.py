"""What mkdocs.yml cannot say: pages from outside docs/, the API of every room, and links that work here and there.

A page keeps the links that work in the repository. In the site a link to another page of it leads to that page; one to
any other file of the repository leads to `ISKD_URL/blob/ISKD_REF/FILE` where the builder names the project's home (as
for the package, docs/metadata.py), and else to a copy of the file in the site. A notebook becomes a page of its cells.
"""

from __future__ import annotations

import ast
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
_ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
_FOLDERS = ("experiments", "benchmarks")
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
_BIG = 1 << 20  # bytes of a file that the site copies


def pages() -> dict[str, str]:
    """Address in the site by path in the repository, of every page that somebody wrote."""
    found = dict(_ROOT_PAGES)
    for folder in _FOLDERS:
        found |= {_path(file): _path(file) for file in sorted((ROOT / folder).rglob("*.md"))}
    for pattern in ("*.md", "*.ipynb"):
        for file in sorted((ROOT / DOCS).rglob(pattern)):
            found[_path(file)] = _path(file.with_suffix(".md")).removeprefix(DOCS)
    return found


def relinked(text: str, source: str, known: dict[str, str], elsewhere: Callable[[str], str]) -> str:
    """A page's text with links as they are in the site.

    Args:
        text: markdown.
        source: its path in the repository.
        known: see `pages`.
        elsewhere: the address, from the site's root or absolute, of a file of the repository that is no page.
    """
    here = posixpath.dirname(known[source])

    def link(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        path, sharp, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if (ROOT / path).is_dir():
            path = f"{path}/README.md"
        if path in known:
            there = known[path]
        elif path.startswith(DOCS) and not path.endswith(".py"):
            there = path.removeprefix(DOCS)
        else:
            there = elsewhere(path)
        there = there if "://" in there else posixpath.relpath(there, here or ".")
        return f"{before}{there}{sharp}{anchor}{after}"

    return _LINK.sub(link, text)


def notebook(text: str) -> str:
    """The cells of a notebook as markdown; a code cell is a block of Python."""
    cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    return "\n\n".join(f"```python\n{said}\n```" if kind == "code" else said for kind, said in cells) + "\n"


def api() -> Iterator[tuple[str, str]]:
    """File and text of a page for `iskd` itself and for the face of every room."""
    for file in sorted((ROOT / "iskd").rglob("__init__.py")):
        room = _path(file.parent).replace("/", ".")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        ]
        homes = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        shown = [name for name in (names[0] if names else ()) if name in homes and not name.startswith("__")]
        if shown:
            first, _, rest = (ast.get_docstring(tree) or "").partition("\n")
            body = "\n\n".join(f"::: {homes[name]}" for name in shown)
            yield f"api/{room}.md", f"# {room}\n\n{first}\n{rest}\n\n{body}\n"


# ---- what mkdocs calls -----------------------------------------------------------------------------------------------


def on_files(files: Any, *, config: Any) -> Any:
    """Add what lies outside docs/, and copies of files that pages link to."""
    from mkdocs.structure.files import File

    known, copied = pages(), set[str]()
    for source in sorted(known):
        if not source.endswith(".ipynb"):
            relinked(_prose(source), source, known, lambda path: _elsewhere(path, copied))
    for source, address in known.items():
        if not source.startswith(DOCS) or source.endswith(".ipynb"):
            there = files.get_file_from_path(source.removeprefix(DOCS))
            if there is not None:
                files.remove(there)
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, address, content=notebook(text) if source.endswith("b") else text))
    for path in sorted(copied):
        files.append(File.generated(config, _copy_of(path), abs_src_path=str(ROOT / path)))
    for address, text in api():
        files.append(File.generated(config, address, content=text))
    _fill(config["nav"], sorted(file.src_uri for file in files))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Turn links of the repository into links of the site."""
    known = pages()
    sources = {address: source for source, address in known.items()}
    source = sources.get(page.file.src_uri)
    return markdown if source is None else relinked(markdown, source, known, lambda path: _elsewhere(path, set()))


def on_post_build(*, config: Any) -> None:
    """Refuse a site with a link to a file that it does not have; anchors are mkdocs' own business."""
    site = Path(config["site_dir"])
    dead = set()
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if "://" in target or target.startswith(("mailto:", "data:", "//", "/")):
                continue
            there = page.parent / unquote(target)
            if not (there / "index.html" if there.is_dir() else there).is_file():
                dead.add(f"{page.relative_to(site)} -> {target}")
    if dead:
        raise RuntimeError("links to nowhere: " + ", ".join(sorted(dead)))


def _fill(nav: list[Any], every: list[str]) -> None:
    """Put all pages of a folder in the place of `FOLDER/`."""
    for entry in nav:
        for title, value in entry.items():
            if isinstance(value, list):
                _fill(value, every)
            elif value.endswith("/"):
                entry[title] = [path for path in every if path.startswith(value) and path.endswith(".md")]


def _prose(source: str) -> str:
    return _FENCED.sub("", (ROOT / source).read_text(encoding="utf-8"))


def _elsewhere(path: str, copied: set[str]) -> str:
    home = os.environ.get("ISKD_URL", "").rstrip("/")
    if home:
        return f"{home}/blob/{os.environ.get('ISKD_REF') or 'HEAD'}/{path}"
    if (ROOT / path).is_file() and (ROOT / path).stat().st_size < _BIG:
        copied.add(path)
    return _copy_of(path)


def _copy_of(path: str) -> str:
    """Where a copy lies: as text, which browsers show, but for pictures and pages."""
    return f"files/{path}" if path.endswith((".png", ".svg", ".html")) else f"files/{path}.txt"


def _path(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()

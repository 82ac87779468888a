"""Writes docs/parts.md, one row per part, from what the parts say of themselves: `make parts`.

A part is a yaml of conf/{block,mixer,refit,importance,loss,schedule,edit}. What it is stands in the first clause of its
class's docstring, and four facts at the end of it:

    Source: the paper, or whose idea it is
    Needs: what must be there, beside a model and text
    Costs: parameters, memory, passes
    Measured: the best result and, in parentheses, the file of this repository that holds it; or `not measured`

A fact goes on in indented lines. `Measured for NAME: ...` is for the yaml NAME alone, where several share a class, and
`What for NAME: ...` says what that one is. Figures before a file in parentheses must stand in it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "parts.md"
KINDS = {
    "block": "Compact blocks, in the place of a whole block (`edit=replace`)",
    "mixer": "Mixers, in the place of attention (`edit=convert`)",
    "refit": "Refits: what is done to the survivors right after an edit",
    "importance": "Importance: which layer goes first",
    "loss": "Losses: what the student is asked to match",
    "schedule": "Schedules: which stage comes next",
    "edit": "Edits: what is done to a layer",
}
FACTS = ("Source", "Needs", "Costs", "Measured")
UNMEASURED = "not measured"
FACT = re.compile(rf"^(What|{'|'.join(FACTS)})(?: for (\w+))?: (.+(?:\n {{4}}\S.*)*)", re.MULTILINE)
FILE = re.compile(r"\(((?:experiments|benchmarks)/[\w./-]+)\)")
FIGURE = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?")
HEAD = """\
# Parts

Made from the parts' own docstrings by `make parts`; a test compares. Each name is a value of the group's key, such as
`block=slim`. KL is to the teacher in nats per token. A figure is the best one that was measured, and stands where its
link leads, with what it was compared with. The costs of mixers are of all layers converted; the time of a token is in
units of attention's at a context of 128, and attention stands for a cache with room ahead.
"""


@dataclass(frozen=True)
class Part:
    """A yaml of a group of parts, and the facts of its class.

    Attributes:
        kind: the group.
        name: the file's.
        target: the dotted name of the class.
        facts: `What` and `FACTS`.
    """

    kind: str
    name: str
    target: str
    facts: dict[str, str]

    def quoted(self) -> Iterator[tuple[str, str, list[str]]]:
        """A fact's name, a file that it names, and the figures that are quoted from it."""
        for key, text in self.facts.items():
            start = 0
            for match in FILE.finditer(text):
                yield key, match[1], FIGURE.findall(text[start : match.start()])
                start = match.end()

    def row(self) -> str:
        """Its line of the page's table."""
        file = "/".join(self.target.split(".")[:-1]) + ".py"
        cells = (shown(self.facts[key]) for key in ("What", *FACTS))
        return f"| [`{self.name}`](../{file}) | {' | '.join(cells)} |"


def parts(kind: str) -> list[Part]:
    """All parts of a group, by name.

    Raises:
        ValueError: a part does not say all that it must.
    """
    return [part_of(kind, file) for file in files(kind)]


def files(kind: str) -> list[Path]:
    """The yamls of a group that name a class; `refit=none` does not."""
    found = sorted((ROOT / "conf" / kind).glob("[!_]*.yaml"))
    return [file for file in found if any(targets(yaml.safe_load(file.read_text(encoding="utf-8"))))]


def part_of(kind: str, file: Path) -> Part:
    """A yaml's part. Raises ValueError naming what is missing in the docstring."""
    target = next(targets(yaml.safe_load(file.read_text(encoding="utf-8"))))
    return Part(kind, file.stem, target, facts_of(get_class(target), file.stem))


def facts_of(cls: type, name: str) -> dict[str, str]:
    """What a class says of the part of this name. Raises ValueError naming what is missing in its docstring."""
    docstring = inspect.cleandoc(vars(cls).get("__doc__") or "")
    found = {(key, owner): " ".join(text.split()) for key, owner, text in FACT.findall(docstring)}
    facts = {"What": re.split(r"[.;:](?:\s|$)", docstring, maxsplit=1)[0]}
    for key in ("What", *FACTS):
        fact = found.get((key, name), found.get((key, "")))
        if fact is not None:
            facts[key] = fact
    missing = [key for key in FACTS if key not in facts]
    if missing:
        raise ValueError(
            f"{cls.__module__}.{cls.__name__} does not say what docs/parts.md needs of {name}: end its docstring with "
            f"lines of the form `{missing[0]}: ...` for {', '.join(missing)}; `Measured: {UNMEASURED}` where nothing "
            "was, otherwise figures and (experiments/NAME/README.md)"
        )
    return facts


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in a yaml."""
    if isinstance(node, dict):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for value in node.values():
            yield from targets(value)


def shown(text: str) -> str:
    """A fact as a cell of the table, with links."""
    text = text if text.startswith("arXiv") else f"{text[:1].upper()}{text[1:]}"
    text = text.replace("|", "\\|")
    text = re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)
    return FILE.sub(lambda match: f"([{match[1].removesuffix('/README.md')}](../{match[1]}))", text)


def page() -> str:
    """The text of docs/parts.md."""
    text = HEAD
    for kind, title in KINDS.items():
        text += f"\n## {title}\n\n| `{kind}=` | what it is | source | needs | costs | best measured |\n"
        text += "|---|---|---|---|---|---|\n"
        text += "".join(f"{part.row()}\n" for part in parts(kind))
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

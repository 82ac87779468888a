"""docs/parts.md: written by its script, complete, and quoting only figures that were measured."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from docs.parts import FIGURE, FILE, KINDS, PAGE, ROOT, UNMEASURED, Part, facts_of, files, page, parts

ALL = {f"{part.kind}/{part.name}": part for kind in KINDS for part in parts(kind)}


def test_the_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/parts.md is older than the docstrings: make parts"


@pytest.mark.parametrize("kind", KINDS)
def test_every_yaml_has_a_row(kind: str) -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]", page().partition(f"| `{kind}=` |")[2].partition("\n## ")[0], re.MULTILINE)
    assert rows == [file.stem for file in files(kind)]


def places(text: str) -> Iterator[str]:
    """Tables, paragraphs and items of a list, below the headings above them; a table below its caption, too."""
    headings: dict[int, str] = {}
    above = ""
    for block in re.split(r"\n\s*\n|\n(?=- )", text):
        if level := len(block) - len(block.lstrip("#")):
            headings = {other: line for other, line in headings.items() if other < level} | {level: block}
        yield "\n".join([*headings.values(), *([above] if block.startswith("|") else []), block])
        above = block


@pytest.mark.parametrize("part", ALL.values(), ids=list(ALL))
def test_figures_stand_together_where_they_are_said_to(part: Part) -> None:
    for fact, name, figures in part.quoted():
        text = (ROOT / name).read_text(encoding="utf-8")
        if fact != "Measured":  # costs are put together from several measurements
            assert set(figures) <= set(FIGURE.findall(text)), f"{part.target} quotes {figures} from {name}"
            continue
        missing = min((set(figures) - set(FIGURE.findall(place)) for place in places(text)), key=len)
        assert not missing, (
            f"{part.target} quotes {figures} from {name}, where {missing} stand nowhere beside the others"
        )


@pytest.mark.parametrize("part", ALL.values(), ids=list(ALL))
def test_what_was_measured_has_figures_and_a_place(part: Part) -> None:
    measured = part.facts["Measured"]
    if measured != UNMEASURED:
        assert FIGURE.search(measured), f"{part.target}: a measured result is a figure"
        rest = measured[max((match.end() for match in FILE.finditer(measured)), default=0) :]
        assert not FIGURE.search(rest), f"{part.target}: of {rest!r} no file is named, (experiments/NAME/README.md)"


def test_a_part_that_says_nothing_is_told_what_to_write() -> None:
    class Mine:
        """Something new; and more.

        Source: ours
        Needs: a long
            line
        Needs for yours: nothing
        Costs: nothing
        """

    with pytest.raises(ValueError, match=r"Mine .* of mine: end its docstring with lines of the form `Measured: "):
        facts_of(Mine, "mine")
    assert Mine.__doc__ is not None
    Mine.__doc__ += "Measured: not measured"
    facts = {"What": "Something new", "Source": "ours", "Costs": "nothing", "Measured": UNMEASURED}
    assert facts_of(Mine, "mine") == facts | {"Needs": "a long line"}
    assert facts_of(Mine, "yours") == facts | {"Needs": "nothing"}

"""The bones of our html pages: shell, sections, tables in a box of their own, figures. Inline style, no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from iskd.report_style import css

_MOST_ITEMS = 12  # of a list in a manifest; hashes of windows run to thousands


class Markup(str):
    """Text that is html already; every other cell of a table is escaped."""

    __slots__ = ()


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page: `title` as text, `sections` as html; empty sections are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} - iskd report</title>\n<style>{css()}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A section of html under a heading; empty for an empty body."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def details(title: str, body: str) -> str:
    """Html that is folded away until it is asked for; empty for an empty body."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def preformatted(text: str | None) -> str:
    """Text as it stands, in a box that scrolls; empty for None."""
    return "" if text is None else f'<pre tabindex="0">{escape(text)}</pre>'


def notes(items: Sequence[str]) -> str:
    """What the page lacks and why, one item a line; empty without items."""
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<section class="notes"><h2>Not in this report</h2><ul>{listed}</ul></section>' if items else ""


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Numbers to be seen first: (name, value, small print) each."""
    body = ""
    for name, value, below in items:
        small = f"<small>{escape(below)}</small>" if below else ""
        body += f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>"
    return f'<dl class="tiles">{body}</dl>' if body else ""


def figures(drawn: Iterable[tuple[str | None, str]]) -> str:
    """Figures (svg, caption as text) side by side where there is room; those without an svg are left out."""
    body = "".join(f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>\n" for svg, text in drawn if svg)
    return f'<div class="figures">{body}</div>' if body else ""


def table(
    label: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    kind: str,
    classes: Sequence[str] = (),
) -> str:
    """A table inside a box that scrolls on its own, by touch and by key; empty without rows.

    Args:
        label: What the table holds, for readers who cannot see it.
        columns: Heads, as text.
        rows: Cells of every row; text, or `Markup`.
        kind: Class of the table.
        classes: Class of every row, where rows have one.
    """
    body = ""
    for number, row in enumerate(rows):
        mark = f' class="{escape(classes[number])}"' if number < len(classes) and classes[number] else ""
        cells = "".join(f"<td>{cell if isinstance(cell, Markup) else escape(cell)}</td>" for cell in row)
        body += f"<tr{mark}>{cells}</tr>\n"
    if not body:
        return ""
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="{kind}">'
        f"<thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def properties(label: str, value: Any) -> str:
    """A JSON value as a table of dotted keys and texts; empty when it holds nothing."""
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(text)}</td></tr>\n' for key, text in flat("", value)
    )
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
    return f'{box}<table class="properties"><tbody>{rows}</tbody></table></div>' if rows else ""


def flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """A JSON value as (dotted key, text) rows; long lists are cut and say so."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flat(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value[:_MOST_ITEMS]):
        for i, item in enumerate(value[:_MOST_ITEMS]):
            yield from flat(f"{key}[{i}]", item)
        if len(value) > _MOST_ITEMS:
            yield f"{key}[...]", f"{len(value)} in all"
    elif isinstance(value, list):
        more = f", ... ({len(value)} in all)" if len(value) > _MOST_ITEMS else ""
        yield key, ", ".join(map(str, value[:_MOST_ITEMS])) + more
    elif value is not None:
        yield key, f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)

"""HTML of our pages: shell, sections, tables in a box of their own, figures. Inline style, no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from iskd.report.figures.style import PALETTE

_DARK = {
    "ink": "#e6e9ed",
    "muted": "#98a2ad",
    "grid": "#2b3138",
    "surface": "#14171b",
    "cell": "#434b55",
    "blue": "#56a8e0",
    "vermillion": "#f0813a",
    "green": "#2fc39b",
    "orange": "#f0b429",
    "purple": "#d893b8",
    "sky": "#8accf2",
}


def css() -> str:
    """The page's style sheet: the figures' palette as variables for light and dark, and the rules."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in p.items()) for p in (PALETTE, _DARK))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_RULES}"


_RULES = """
:root{--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
*{box-sizing:border-box}
body{margin:0;background:var(--surface);color:var(--ink);font:16px/1.55 var(--sans);-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.2;letter-spacing:-.015em;margin:0 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .9rem}
h3{font-size:.95rem;margin:1.4rem 0 .4rem}
section{margin-top:3rem}
.lead{font-size:1.1rem;max-width:46rem;margin:0 0 1.6rem;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(122px,1fr));gap:1.1rem 1rem;margin:0;
border-top:1px solid var(--grid);border-bottom:1px solid var(--grid);padding:1.1rem 0}
dt{font-size:.8rem;color:var(--muted)}
dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
small,.hint,figcaption{display:block;font-size:.8rem;color:var(--muted);letter-spacing:0}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
.stages{width:100%}
th,td{padding:.4rem .55rem;border-bottom:1px solid var(--grid);text-align:right;vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{padding-left:0}
th{font-weight:500;color:var(--muted)}
thead th{vertical-align:bottom;white-space:normal;min-width:4rem}
thead th:first-child{min-width:0}
.stages td:nth-child(2){min-width:9rem;white-space:normal}
.stages :is(th,td):is(:first-child,:nth-child(2),:last-child),.properties :is(th,td){text-align:left}
.aside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.5rem 2.5rem;
align-items:start}
.aside>*{min-width:0}
.scroll{background:linear-gradient(90deg,var(--surface) 30%,transparent) 0/2.5rem 100% no-repeat local,
linear-gradient(-90deg,var(--surface) 30%,transparent) 100%/2.5rem 100% no-repeat local,
linear-gradient(90deg,var(--cell),transparent) 0/.6rem 100% no-repeat scroll,
linear-gradient(-90deg,var(--cell),transparent) 100%/.6rem 100% no-repeat scroll}
.named td:first-child{text-align:left;white-space:normal;min-width:7rem;overflow-wrap:anywhere}
.named thead th{min-width:3rem}
.named th:first-child,.runs :is(th,td):first-child{text-align:left}
.runs :is(th,td):first-child{position:sticky;left:0;background:var(--surface);padding-right:.8rem;z-index:1}
.runs thead th:nth-child(n+2){min-width:5.5rem}
.name,.value{display:inline-block;width:max-content;max-width:min(14rem,40vw);white-space:normal;overflow-wrap:break-word}
.name b{margin-right:.3rem}
.setback td,.mean td{color:var(--muted)}
.setback .mark{display:block;font-size:.8rem;color:var(--vermillion);font-weight:600}
.mean td:not(:first-child){font-style:italic}
a{color:var(--blue)}
.properties td{white-space:normal;overflow-wrap:anywhere}
.rolled_back td{color:var(--muted)}
.rolled_back td:last-child{color:var(--vermillion);font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:2.4rem 2.5rem}
figure{margin:0;min-width:0}
svg{display:block;width:100%;max-width:100%;height:auto;margin-bottom:.5rem}
.words :is(th,td){text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;min-width:8rem}
.words :is(th,td):last-child{min-width:4rem}
.events,.notes ul{margin:0;padding-left:1.1rem;font-size:.9rem;overflow-wrap:anywhere}
.notes{border-left:3px solid var(--orange);padding-left:1rem;margin-top:2rem}
@media (max-width:480px){main{padding:1.5rem 1rem 3rem}}
details{margin-top:1.5rem;border-top:1px solid var(--grid);padding-top:.9rem}
summary+*{margin-top:.8rem}
summary{cursor:pointer;font-weight:600}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:.8rem/1.5 var(--mono);margin:.8rem 0 0}
"""

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

"""Markup, notations and data of programs that a text shows in its first lines, whatever its suffix; none is read.

A text that merely begins as one of them does (a poem, code, a dialogue, a Markdown document) stays text: what has no
beginning of its own is known only where every line has its form.
"""

from __future__ import annotations

import ast
import json
import re
import warnings

from iskd.data.files.structure import begins_json

# by name; or an element that holds another, or all of the text, or stands before another of its name
_XML = re.compile(
    r"<(\?xml|!doctype|!--|html\b|mediawiki\b|doc id=|"
    r"([a-z][\w.:-]*)(\s[^<>]*)?>\s*(<[a-z!]|.*?</\2\s*>\s*<\2[\s>]|.*</\2\s*>\s*\Z))",
    re.I | re.S,
)
_PYTHON = "Python's notation of rows and no JSON (json.dumps writes that)"
_BEGINNINGS = {
    "HTML or XML": _XML,
    "RTF": re.compile(r"\{\\rtf"),
    "subtitles": re.compile(
        r"WEBVTT\b|\[Script Info\]|\d+\n[\d:]+[,.]\d{3} --> [\d:]+[,.]\d{3}|\d+(:\d\d){2}\.\d{3},\d+(:\d\d){2}\.\d{3}\n"
        r"|(\[(ti|ar|al|au|by|re|ve|offset|length):[^\n\]]*\]\s*)*\[\d\d:\d\d\.\d\d"
    ),
    "translations (gettext)": re.compile(r"(#[^\n]*\n|\s)*msgid \"[^\n]*\"\n(\"[^\n]*\"\n)*msgstr"),
    "a web archive (WARC)": re.compile(r"WARC/\d"),
    "PostScript": re.compile(r"%!PS\b"),
    "a bibliography (BibTeX)": re.compile(r"@\w+\s*\{\s*[\w:./+-]+\s*,\s*\w+\s*="),
    "SQL": re.compile(
        r"(?:--[^\n]*\n|\s)*((CREATE|DROP) (TABLE|DATABASE)|INSERT INTO|PRAGMA \w+=|BEGIN TRANSACTION|/\*!\d+ )"
    ),
    "a mail box": re.compile(r"From \S+@\S+ +\w{3} \w{3} +\d|(Message-ID|Return-Path|Received): [^\n]*\n([\w-]+:)?\s"),
    "a calendar or an address book": re.compile(r"BEGIN:V(CALENDAR|CARD)\b"),
    "events with JSON in them": re.compile(r"data: ?[{\[]\s*[\"{]"),
    "a pickle": re.compile(r"\([ld]p\d+\n[(aSVsIFgctdl]|c(copy_reg|__builtin__|builtins|numpy[\w.]*)\n\w+\n"),
    _PYTHON: re.compile(r"\[?\s*\{'[^'\n]+': *['\"\[{\d]"),
}
_LINES = {  # of which every line is
    "YAML": re.compile(r"(- |  )\s*[\w-]+:( .*)?"),
    "settings (INI or TOML)": re.compile(r"\[[\w. \"-]+\]|[\w.-]+ *= *\S.*|[#;].*"),
    "a table of Markdown": re.compile(r"[|+].*[|+]"),
    "tagged words (CoNLL)": re.compile(r"-DOCSTART-.*|\S+( \S+)* (O|[BIESLU]-[\w-]+)"),
    "a list in Python's notation": re.compile(r"[\[(]?\s*('([^'\\]|\\.)+'|\"([^\"\\]|\\.)+\"),?\s*[\])]?|[\[(\])]"),
}
_FIRST = {  # how the first line of such begins
    "YAML": "-",
    "settings (INI or TOML)": "[",
    "a table of Markdown": "|+",
    "a list in Python's notation": "[(",
}
_BLOCKS = re.compile(r"---.*|\.\.\.|#.*|(- )*[\w-]+:( .*)?|\s+.*")
_BLOCK = re.compile(r"^(- |\s)*[\w-]+: [|>][+-]?$", re.M)
_RULER = re.compile(r"[\s|:-]*-[\s|:-]*")
_MARKS = ("|||", "||", "^", "\x01", "\x02", "\x1f")
_ASSIGNED = re.compile(r"((var|let|const|export|window)\b[ .])?[\w$. ]+=\s*(?=[\[{]\s*[{\"])")
_LEAST_LINES = 3
_LITERALS = 20


def markup_in(look: str, whole: bool) -> str | None:
    """The name of what a text is beside prose and rows, for a sentence; None = it is prose, notes or code.

    Args:
        look: its beginning, without space in front.
        whole: whether that is all of it.
    """
    begins = next((name for name, pattern in _BEGINNINGS.items() if pattern.match(look)), None)
    if begins:
        return begins
    if (head := _ASSIGNED.match(look)) and begins_json(look[head.end() :].rstrip("; \r\n"), whole, torn=False):
        return "JSON in a script, behind a name and an equals sign"
    lines = [line.rstrip() for line in look.split("\n")[: None if whole else -1] if line.strip()]
    if lines and _is_python(look if whole else "", lines):
        return _PYTHON
    return _by_lines(lines) if len(lines) >= _LEAST_LINES else None


def _by_lines(lines: list[str]) -> str | None:
    for name, pattern in _LINES.items():
        first = tuple(_FIRST.get(name, ())) or ("",)
        if lines[0].startswith(first) and all(map(pattern.fullmatch, lines)):
            return name
    if all(map(_BLOCKS.fullmatch, lines)) and _BLOCK.search("\n".join(lines)):
        return "YAML"
    if _RULER.fullmatch(lines[1]) and all("|" in line for line in lines):
        return "a table of Markdown"
    mark = next((mark for mark in _MARKS if mark in lines[0]), None)
    if mark and len({line.count(mark) for line in lines}) == 1:
        return f"a table whose cells {mark!r} parts"
    return "lines that end in JSON" if all(map(_ends_in_json, lines)) else None


def _ends_in_json(line: str) -> bool:
    at = line.find('{"')
    try:
        return at > 0 and bool(json.loads(line[at:]))
    except (ValueError, RecursionError):
        return False


def _is_python(whole: str, lines: list[str]) -> bool:
    """Whether a text, or each of its lines, is a list, tuple or mapping of texts as Python writes it."""
    if lines[0][:1] not in ("[", "(", "{") or "'" not in lines[0] + lines[min(1, len(lines) - 1)]:
        return False
    return _is_literal(whole) or (len(lines) > 1 and all(map(_is_literal, lines[:_LITERALS])))


def _is_literal(text: str) -> bool:
    if text[:1] not in ("[", "(", "{"):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(value, list | tuple | dict) and any(isinstance(each, str | list | tuple | dict) for each in value)

"""What kind of text a file holds: by its suffix and its first bytes, so that no structured text is read as prose.

A text that merely begins as JSON does (a poem, LaTeX, code) stays text: it is JSON only where it is so as far as the
look goes.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from iskd.data.decoding import codec_of, first_bytes, packed

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
KINDS = tuple(dict.fromkeys(FORMATS.values()))
# What 0.1 did not read as text, by suffix: shards that it made of other files in another way are not taken up.
_OF_0_1 = {".jsonl": "jsonl", ".parquet": "parquet"}
# Read as prose these would be markup or noise, whatever bytes they begin with.
_MARKUP = {".html", ".htm", ".xhtml", ".xml", ".svg", ".rtf", ".bib"}
_MARKUP |= {".yaml", ".yml", ".toml", ".sql", ".srt", ".vtt", ".psv", ".tab"}
_OTHER = {
    ".pdf",
    ".doc",
    ".docx",
    ".odt",
    ".epub",
    ".xls",
    ".xlsx",
    ".zip",
    ".tar",
    ".tgz",
    ".7z",
    ".rar",
    ".lz4",
    ".br",
}
_UNPACK = "unpack it and give the files in it"
_CONVERT = "convert it to .txt or .jsonl"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (or a document that is one)", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a rar archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "packed by lz4", "unpack it (lz4 -d FILE)"),
    (b"\x1f\x9d", "packed by compress", "unpack it (uncompress FILE)"),
    (b"%PDF-", "a PDF", "extract its text (pdftotext FILE FILE.txt)"),
    (b"GGUF", "a model in GGUF form", "give a text"),
    (b"\x93NUMPY", "a numpy array", _CONVERT),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"ORC", "an ORC file", "convert it to .parquet"),
    (b"FEA1", "Feather version 1", "write it again as version 2 or as .parquet"),
    (b"SQLite format 3\0", "an SQLite data base", _CONVERT),
    (b"\x7fELF", "a program", "give a text"),
    (b"\x89PNG", "a picture", "give a text"),
    (b"\xff\xd8\xff", "a picture", "give a text"),
    (b"GIF8", "a picture", "give a text"),
)
_TABLES = {
    re.compile(rb"PAR1[\x00-\x08\x0e-\x1f]"): "parquet",
    re.compile(rb"ARROW1\0\0|\xff{4}.{2}\0\0", re.S): "arrow",
}
_LFS = b"version https://git-lfs"
# by name; or an element that holds another, or all of the text
_XML = re.compile(
    r"<(\?xml|!doctype|!--|html\b|mediawiki\b|doc id=|([a-z][\w.:-]*)(\s[^<>]*)?>\s*(<[a-z!]|.*</\2\s*>\s*\Z))",
    re.I | re.S,
)
_LOOK = 64 << 10


def suffix_of(file: Path) -> str:
    """The suffix that tells the kind, in small letters: that of `a.json.gz` is `.json`."""
    return (Path(file.stem) if packed(file.suffix) else file).suffix.lower()


def kind_of(file: Path, fmt: str, key: str) -> str:
    """How a file is to be read, one of `KINDS`.

    Args:
        file: the file; packed ones are looked into.
        fmt: `auto`, or what the user says that it is.
        key: the option under which `fmt` is set (`data.source`), or one that has none (`eval.text`); for errors.

    Raises:
        ValueError: it is of a kind that is not read.
    """
    head, suffix = first_bytes(file, _LOOK), suffix_of(file)
    _refuse_binary(file, head, fmt)
    binary = next((name for magic, name in _TABLES.items() if magic.match(head)), None)
    if binary:
        if first_bytes(file, 4, unpack=False) != head[:4]:
            raise ValueError(f"{file} is packed on top of its own packing ({binary}); unpack it first")
        if fmt not in ("auto", binary):
            raise ValueError(f"{file} is {binary}, not {fmt}; set data.source.fmt={binary} or auto")
        return binary
    if fmt != "auto":
        return fmt
    fix = as_text(key)
    if suffix in _OTHER or suffix in _MARKUP:
        fix = fix if suffix in _MARKUP else ""
        raise ValueError(f"{file}: {suffix} files are not read; convert it to .jsonl, .parquet or .txt{fix}")
    kind = FORMATS.get(suffix, "text")
    look = _decoded(head)
    if kind in ("text", "csv", "tsv") and _is_json(look, whole=len(head) < _LOOK):
        return "jsonl"
    if kind == "text" and (_XML.match(look) or look.startswith("{\\rtf")):
        name = "RTF" if look.startswith("{") else "HTML or XML"
        raise ValueError(f"{file} is {name}, which is not read: take its text out to .txt or .jsonl{fix}")
    return kind


def as_text(key: str) -> str:
    """What to add to a fix where the user may decide that it is plain text all the same."""
    return "" if key == "eval.text" else f", or set {key}.fmt=text where the text is meant as it stands"


def read_otherwise(file: Path, fmt: str, kind: str) -> bool:
    """Whether iskd 0.1 read a file as another kind, so that the tokens it stored are not those of now."""
    suffix = (Path(file.stem) if file.suffix == ".gz" else file).suffix
    return kind != (_OF_0_1.get(suffix, "text") if fmt == "auto" else fmt)


def _refuse_binary(file: Path, head: bytes, fmt: str) -> None:
    if head.startswith(_LFS):
        raise ValueError(f"{file} is a Git LFS pointer and not the file: fetch it (git lfs pull), or download it again")
    what = next(((name, fix) for magic, name, fix in _MAGIC if head.startswith(magic)), None)
    if what is None and head[257:262] == b"ustar":
        what = "a tar archive", _UNPACK
    if what is None and head[8:10] in (b'{"', b"{ ") and head[4:8] == b"\0\0\0\0":
        what = "a model's weights (safetensors)", "give a text"
    if what is None and head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        what = "a pickle", _CONVERT
    # four printable letters may begin a text: it is binary where bytes follow that no text has
    if what and (not head[:4].isascii() or head.startswith(b"%PDF-") or b"\0" in head):
        raise ValueError(f"{file} is {what[0]}, which is not read: {what[1]}")


def _decoded(head: bytes) -> str:
    codec = codec_of(head)
    # a character that is cut at the end of the look is left out
    return codecs.getincrementaldecoder(codec)(errors="replace").decode(head).lstrip()


def _is_json(look: str, whole: bool) -> bool:
    """Whether text that is of no JSON suffix begins with a JSON object, or an array of more than numbers."""
    if look[:1] not in ("{", "["):
        # rows below a line of something else: whoever reads rows names that line
        return all(map(_is_row, look.split("\n")[1:3])) and look.count("\n") > 2
    if _begins_json(look, whole):
        return True
    # a first line that is broken makes no prose of the others
    lines = look.split("\n")[1:] if look.startswith("{") else []
    return any(_is_row(line) for line in lines[: 20 if whole else len(lines) - 1][:20])


def _is_row(line: str) -> bool:
    try:
        return line.startswith("{") and bool(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _begins_json(look: str, whole: bool) -> bool:
    try:
        value, end = json.JSONDecoder().raw_decode(look)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        # as far as the look goes it is JSON: what is missing lies behind it, or was torn off
        open_end = error.msg.startswith("Unterminated string") or error.pos >= len(look.rstrip()) - (0 if whole else 8)
        return open_end and re.match(r'\{\s*"|\[\s*[{\["]', look) is not None and (not whole or '":' in look)
    rest = look[end:].lstrip(" \t\r")
    return _has_rows(value) and (not rest or rest[0] in "\n{[")


def _has_rows(value: Any) -> bool:
    if not isinstance(value, list):
        return bool(value)
    return any(_has_rows(item) if isinstance(item, list) else isinstance(item, dict | str) for item in value)

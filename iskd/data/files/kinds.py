"""What kind of text a file holds: by its suffix and its first bytes, so that no structured text is read as prose."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from iskd.data.files.decoding import codec_of, first_bytes, iconv, packed, packing_of, seven_bits
from iskd.data.files.markup import markup_in
from iskd.data.files.structure import is_texts, rows_in

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
_MARKUP |= {
    ".po",
    ".pot",
    ".ass",
    ".ssa",
    ".lrc",
    ".sbv",
    ".properties",
    ".conll",
    ".conllu",
    ".tmx",
    ".xliff",
    ".ttml",
}
_DOCUMENTS = {".pdf", ".doc", ".docx", ".odt", ".epub", ".xls", ".xlsx", ".ps", ".eps", ".djvu"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br", ".lzma", ".sz", ".z", ".warc"}
_UNPACK = "unpack it and give the files in it"
_CONVERT = "convert it to .txt or .jsonl"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (or a document that is one)", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a rar archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "packed by lz4", "unpack it (lz4 -d FILE)"),
    (b"\x1f\x9d", "packed by compress", "unpack it (uncompress FILE)"),
    (b"\x5d\0\0", "packed by lzma", "unpack it (unlzma FILE)"),
    (b"\x78\x9c", "packed by zlib", "unpack it (zlib-flate -uncompress < FILE)"),
    (b"\x78\xda", "packed by zlib", "unpack it (zlib-flate -uncompress < FILE)"),
    (b"\xff\x06\0\0sNaPpY", "packed by snappy", "unpack it (snzip -d FILE)"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of an office program", "save it as .txt or .csv"),
    (b"AT&TFORM", "a DjVu document", "extract its text (djvutxt FILE FILE.txt)"),
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
    if suffix in _ARCHIVES:
        raise ValueError(f"{file}: {suffix} files are not read; {_UNPACK}")
    if suffix in _DOCUMENTS or suffix in _MARKUP:
        fix = fix if suffix in _MARKUP else ""
        raise ValueError(f"{file}: {suffix} files are not read; convert it to .jsonl, .parquet or .txt{fix}")
    if encoding := seven_bits(head):
        raise ValueError(f"{file} is {encoding}, in which letters are written by signs; {iconv(file, encoding)}{fix}")
    kind = FORMATS.get(suffix, "text")
    if kind in _TABLES.values() and head:
        again = "fetch it again, or give it the suffix of what it is"
        raise ValueError(f"{file} is not {kind}, which its suffix says, or damaged at its beginning; {again}{fix}")
    look = _decoded(head)
    whole = len(head) < _LOOK
    rows = rows_in(look, whole) if kind in ("text", "csv", "tsv") else None
    if rows is not None and (rows == "jsonl" or kind == "text"):
        return rows
    if kind == "text" and is_texts(look, whole):
        return "jsonl"
    if kind == "text" and (name := markup_in(look, whole)):
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
    if what is None and (again := packing_of(head)):
        what = f"packed twice (by {again} inside)", "unpack it once and give what comes out"
    if what is None and head[257:262] == b"ustar":
        what = "a tar archive", _UNPACK
    if what is None and head[8:10] in (b'{"', b"{ ") and head[4:8] == b"\0\0\0\0":
        what = "a model's weights (safetensors)", "give a text"
    if what is None and head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        what = "a pickle", _CONVERT
    # four printable letters may begin a text: it is binary where bytes follow that no text has
    if what and (not head[:4].isascii() or min(head[:4]) < 9 or head.startswith(b"%PDF-") or b"\0" in head):
        raise ValueError(f"{file} is {what[0]}, which is not read: {what[1]}")


def _decoded(head: bytes) -> str:
    codec = codec_of(head)
    # a character that is cut at the end of the look is left out
    return codecs.getincrementaldecoder(codec)(errors="replace").decode(head).lstrip()

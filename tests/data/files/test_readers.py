"""`iskd.data.files.readers`: structured files are read by field or refused by name, never as prose."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from iskd.data.files.chat import ROWS
from iskd.data.files.readers import find_files, find_splits, placed_files, read_file
from iskd.data.sources import HubDataset, TextFiles
from iskd.evaluation.text import read_text

_DOCUMENTS = ["Document 0.", 'Document, 1: \u00e9\n\n"quoted"; it\'s', "Document 2." + " long" * 30_000]
_ROWS = [{"text": text, "url": "u", "n": None} for text in _DOCUMENTS]
_LINES = "\n".join(json.dumps(row) for row in _ROWS) + "\n"


def _table(mark: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=mark).writerows([["id", "text"], *([i, text] for i, text in enumerate(_DOCUMENTS))])
    return buffer.getvalue()


def _arrow(form: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    table, sink = pyarrow.table({"text": _DOCUMENTS, "n": [1, 2, 3]}), io.BytesIO()
    if form == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, sink)
    else:
        with getattr(pyarrow.ipc, f"new_{form}")(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def _zstd(content: bytes) -> bytes:
    return bytes(pytest.importorskip("pyarrow").Codec("zstd").compress(content, asbytes=True))


_SAME: dict[str, tuple[str, str]] = {
    "lines": (_LINES, "jsonl json ndjson JSON txt data log"),
    "array": (json.dumps(_ROWS), "json jsonl txt"),
    "array, by line": (json.dumps(_ROWS, indent=1), "json txt"),
    "objects, by line": ("\n".join(json.dumps(row, indent=2) for row in _ROWS), "json jsonl txt"),
    "object of a list": (json.dumps({"version": 1, "tags": ["a"], "data": _ROWS}), "json txt"),
    "object of a list, by line": (json.dumps({"version": 1, "data": _ROWS}, indent=1), "json md"),
    "columns": (json.dumps({"text": _DOCUMENTS}), "json"),
    "comma": (_table(","), "csv CSV txt data"),
    "comma and space": ("id, text\n" + _table(",").partition("\n")[2], "csv txt"),
    "semicolon": (_table(";"), "csv txt"),
    "tab": (_table("\t"), "tsv csv txt"),
}


@pytest.mark.parametrize("name", _SAME)
def test_every_form_of_rows_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    content, suffixes = _SAME[name]
    for suffix in suffixes.split():
        (tmp_path / f"a.{suffix}").write_text(content)
        assert list(read_file(tmp_path / f"a.{suffix}", "auto", "text")) == _DOCUMENTS, suffix


@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
def test_binary_tables_are_known_by_content(tmp_path: Path, form: str) -> None:
    for suffix in ("parquet", "arrow", "bin"):
        (tmp_path / f"a.{suffix}").write_bytes(_arrow(form))
        assert list(read_file(tmp_path / f"a.{suffix}", "auto", "text")) == _DOCUMENTS
    (tmp_path / "a.gz").write_bytes(gzip.compress(_arrow(form)))
    with pytest.raises(ValueError, match=r"a\.gz is packed on top of its own packing .*unpack it"):
        list(read_file(tmp_path / "a.gz", "auto", "text"))
    (tmp_path / "torn.parquet").write_bytes(_arrow(form)[:-40])
    with pytest.raises(ValueError, match=r"torn\.parquet is not .*damaged"):
        list(read_file(tmp_path / "torn.parquet", "auto", "text"))


@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize("end", [-1, 2**31 - 1])
def test_a_table_whose_texts_lie_elsewhere_is_refused(tmp_path: Path, form: str, end: int) -> None:
    """Arrow alone would read beyond the end of the file, and end the process."""
    content = _arrow(form)
    first = len(_DOCUMENTS[0].encode())
    starts = struct.pack("<2i", 0, first)
    assert content.count(starts) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(starts, struct.pack("<2i", 0, end)))
    with pytest.raises(ValueError, match=r"a\.arrow is not an arrow file, or damaged"):
        list(read_file(tmp_path / "a.arrow", "auto", "text"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_that_is_nested_without_end_is_refused(tmp_path: Path, name: str) -> None:
    deep = '{"a":' * 100_000
    cell = deep.replace('"', '""')
    (tmp_path / name).write_text(f'messages\n"{cell}"\n' if name == "a.csv" else f"{deep}\n")
    with pytest.raises(ValueError, match=name):
        list(read_file(tmp_path / name, "auto", ROWS))


@pytest.mark.parametrize(
    ("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", _zstd)]
)
def test_packed_files_are_unpacked_by_content(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(_LINES.encode())
    for name in (f"a.json.{suffix}", f"a.jsonl.{suffix}", f"a.{suffix}", "a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(packed)
        assert list(read_file(tmp_path / name, "auto", "text")) == _DOCUMENTS, name
    (tmp_path / f"t.csv.{suffix}").write_bytes(pack(_table(",").encode()))
    assert list(read_file(tmp_path / f"t.csv.{suffix}", "auto", "text")) == _DOCUMENTS
    (tmp_path / f"two.jsonl.{suffix}").write_bytes(packed + packed + b"\0" * 8 * (suffix in ("gz", "xz")))
    assert list(read_file(tmp_path / f"two.jsonl.{suffix}", "auto", "text")) == _DOCUMENTS * 2
    damaged = (packed[:-20], packed + b"garbage that is no stream", packed + packed[: len(packed) // 2])
    for content in (*damaged, b"text\n", gzip.compress(b"x") if suffix != "gz" else b"PK\3\4"):
        (tmp_path / f"bad.txt.{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.txt\.\w+ is not a whole \w+ file"):
            list(read_file(tmp_path / f"bad.txt.{suffix}", "auto", "text"))


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_tell_the_encoding_and_are_no_text(tmp_path: Path, codec: str) -> None:
    for name, content in {"a.jsonl": _LINES, "a.csv": _table(","), "a.txt": "d\u00e9j\u00e0\nvu"}.items():
        (tmp_path / name).write_bytes(content.encode(codec))
        expected = ["d\u00e9j\u00e0\nvu"] if name == "a.txt" else _DOCUMENTS
        assert list(read_file(tmp_path / name, "auto", "text")) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[Enter Hamlet]\n\nTo be or not to be",
        "[1] A note.\n[2] Another.",
        "[1]\nA note.",
        '["Hello," said he,\nand left.]',
        '["Hello"] said he',
        "[[Category:Towns]]\nA town.",
        "{\\bf bold} text",
        "{ int x = 1; }",
        '{"a": foo(), "b": 2}',
        '{\n    "name": "module",  # python\n    "depends": [],\n}',
        '{"a": b}',
        "{}",
        "[]",
        "<s> A story.",
        "<b>Bold</b> words, and more",
        "[[1, 2], [3, 4]]\nis a matrix",
        "<3 you",
        "BZh is no word",
        "PAR1 is one",
        "GIF8 and Rar! too",
        "Obj\nOrc ORC",
        '{"Tom" said Ann}',
        "O Captain, my Captain,\nour trip is done,\nthe port is near,",
        "Apples, pears\nBeans, peas\nCorn, wheat",
        "int x;\nint y;\nreturn x;",
        "def f(a):\n\treturn a\ndef g(b):\n\treturn b",
        "a\tb\nc\td",
        "1,5 kg\n2,5 kg and more\nno more",
        '"One, two."\n"Three, four."\n"Five, six."',
        "---\ntitle: x\n---\nA text.",
        "- one: two\n- three\n- four: five",
        "[Scene]\nANN = BOB\nLeave me.",
        "From: Ann\nTo: Bob\n\nDear Bob",
        "Create table and chairs\nINSERT COIN",
        "1\n2\n3",
        "<s>One</s> and more words",
        "a.b = [1, 2]\nc = 3",
        'x = {"a": 1}\nprint(x)',
        '// adds\nint add(int a);\n{"a"}',
        'An example:\n\n{"text": "a"}\n\nis a row. So is\n\n{"text": "b"}\n\nand no other.',
        'An example:\n\n{"text": "a"}\n\nis a row.',
        '12:00 INFO {"text": "a"}\n12:01 started\n12:02 stopped',
        "# Title\n\nFirst, second\nThird, fourth\nFifth, sixth",
        "title, body\nand soul",
        "x ^ y\nis a power\nof x ^ y",
        "# Title\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nA table.",
        "To be or not\nO what a NO\nsay I",
        "['tis one,\n 'tis two,\n 'tis three]",
        "('One', he said)\n('Two', said she)",
        "---\ntitle: |\n  two lines\n---\nA text.",
        "Ann: one\nBob: two\n  (aside)",
        "[00:12] Ann: hi\n[00:13] Bob: ho",
        "(format t ~{~a~}) ~{test~} ~{ ~A~}",
        "a+bcd-e and x+abc-y +ABC- is +1-2",
        "Call +12065550170, +12065550168 or +1206 555",
        "MIIC+AAOS/8a+HX4pq+Zk0d9+3vA/x+Q0dh+4Ab",
        "\x1b[31mred\x1b[0m and black",
    ],
)
def test_a_text_that_begins_as_something_else_stays_text(tmp_path: Path, text: str) -> None:
    for name in ("a.txt", "a.md", "a"):
        (tmp_path / name).write_text(text)
        assert list(read_file(tmp_path / name, "auto", "text")) == [text]


_TORN = json.dumps({"text": "x" * 70_000})
_WORDS = "words and more of them\n" * 4_000
_GERMAN = "\u201eHallo!\u201c & \u00dcber den D\u00e4chern ist es sch\u00f6n\n" * 3
_CHINESE = "\u4f60\u597d\u4e16\u754c\n" * 3
_STRUCTURED: list[tuple[bytes, str]] = [  # read as prose without a word, these were learned with all their signs
    ((b"<p>words</p>\n" * 6_000), "is HTML or XML"),
    (f"<doc>\nwords\n</doc>\n<doc>\n{_WORDS}</doc>".encode(), "is HTML or XML"),
    (b"<s> a b </s>\n<s> c d </s>\n" * 4_000, "is HTML or XML"),
    (b'window.YTD.tweets.part0 = [ {"tweet": {"id": "1"}}, {"tweet": {}} ]', "is JSON in a script"),
    (b'var data = [{"text": "' + b"x" * 70_000, "is JSON in a script"),
    (b'// of 2024\n[{"text": "a"}]', "line 1 is not JSON"),
    (b'/* a\n b */ {"text": "a"}\n{"text": "b"}', "line 1 is not JSON"),
    (b'Export of 2024\n\n{"text": "a"}\n{"text": "b"}\n', "line 1 is not JSON"),
    (b'Export of 2024\n[\n {"text": "a"},\n {"text": "b"}\n]\n', "line 1 is not JSON"),
    (b"A line of prose.\n" * 500 + b'{"text": "a"}\n' * 9_000, "line 1 is not JSON"),
    (b'12:00 INFO {"text": "a"}\n12:01 INFO {"text": "b"}\n12:02 {"text": "c"}\n', "is lines that end in JSON"),
    (b"# a comment\nid,text\n1,a\n2,b\n", "no field 'text', only"),
    (b"id ^ text\n1 ^ a\n2 ^ b\n", r"is a table whose cells '\^' parts"),
    (b"id\x01text\n1\x01a\n2\x01b\n", "is a table whose cells"),
    (b"one ||| eins\ntwo ||| zwei\nthree ||| drei\n", "is a table whose cells"),
    (b"| id | text |\n|---|---|\n| 1 | a |\n", "is a table of Markdown"),
    (b"id | text\n---|---\n1 | a\n", "is a table of Markdown"),
    (b"# sent_id = 1\n1\tThe\tDET\n2\tdog\tNOUN\n\n# sent_id = 2\n1\tA\tDET\n", "no field 'text', only"),
    (b"-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n", "is tagged words"),
    (b"['one',\n 'it\\'s two',\n 'three']\n", "is Python's notation"),
    (b"['one',\n" + b" 'another one',\n" * 6_000, "is a list in Python's notation"),
    (b"['one', 'two']\n['three']\n", "is Python's notation"),
    (pickle.dumps([{"text": "one"}, {"text": "two"}], 0), "is a pickle"),
    (b"---\ntext: |\n  words\n  more\n---\ntext: |\n  words\n", "is YAML"),
    (b"- text: >-\n    words and\n    more: of them\n", "is YAML"),
    (b'# a\nmsgid ""\nmsgstr ""\n', "is translations"),
    (b"[Script Info]\nTitle: x\n", "is subtitles"),
    (b"[ar:Ann]\n[00:12.00]La la\n", "is subtitles"),
    (b"0:00:01.000,0:00:02.000\nHi\n", "is subtitles"),
    (_GERMAN.encode("utf-7"), "is UTF-7.*iconv -f UTF-7 -t UTF-8 a"),
    (_CHINESE.encode("utf-7"), "is UTF-7"),
    (_CHINESE.encode("hz"), "is HZ"),
    ("\u3053\u3093\u306b\u3061\u306f".encode("iso2022_jp"), "is ISO-2022-JP.*iconv -f ISO-2022-JP"),
]
_QUOTES = b'id\ttext\n1\t"Well, he said\n2\tfoo bar\n3\tand so on"\n4\tmore\n'
_REFUSED: list[tuple[str, bytes, str]] = [
    ("a.html", b"prose", r"\.html files are not read; .*data\.source\.fmt=text"),
    ("a.PDF", b"prose", r"\.pdf files are not read; convert it to \.jsonl, \.parquet or \.txt$"),
    ("a.txt", b"%PDF-1.7\n", "is a PDF, which is not read: extract its text"),
    ("a.txt", b" <!DOCTYPE html><p>", r"is HTML or XML.*fmt=text"),
    ("a", b"<?xml version='1.0'?>", "is HTML or XML"),
    ("a.txt", b"<TEI><p>one</p></TEI>", "is HTML or XML"),
    ("a.txt", b"<corpus>one</corpus>\n", "is HTML or XML"),
    ("a.yaml", b"- text: one\n", r"\.yaml files are not read; .*fmt=text"),
    ("a.txt", b'[["one", "two"]]', "item 1 is list"),
    ("a.txt", b'# a dump\n{"text": "one"}\n{"text": "two"}\n', "line 1 is not JSON"),
    ("a.txt", b"{\\rtf1 x}", "is RTF"),
    ("a.txt", b"PK\3\4\24\0\0\0", "a zip archive.*unpack"),
    ("a.jsonl.gz", gzip.compress(b"n" * 257 + b"ustar\0" + b"\0" * 250, mtime=0), "a tar archive"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"Git LFS pointer.*git lfs pull"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ("a.txt", b"\x10\0\0\0\0\0\0\0" + b'{"w": {}}', "safetensors"),
    ("a", b"GGUF\3\0\0\0", "GGUF"),
    ("a.bin", b"\x93NUMPY\1\0", "numpy"),
    ("a.json", b"\x80\4\x95\0", "pickle"),
    ("a.txt", b"one\nt\0wo", r"holds NUL bytes \(byte 5, line 2\).*: tr -d '.000' < a\.txt > a\.utf8\.txt"),
    ("a.bin", bytes(range(64)), r"binary \(it holds NUL bytes .*: byte 0, line 1\)"),
    ("a.txt", b"0,one\n1,two\n2,three\n", r"line 1, has no field 'text', only \['0', 'one'\].*line above it.*fmt=text"),
    ("a.txt", b'0\tit\'s, "\n1\ttwo\n2\t"three\n', r"only \['0', 'it\\'s, .*line above it"),
    ("a", b"1|1|1\n2|2|2\n3|3|3\n", r"only \['1', '1', '1'\].*line above it"),
    ("a.txt", b"The\tDT\ndog\tNN\n\na\tDT\n", r"only \['The', 'DT'\]"),
    ("a.txt", b"- text: one\n  id: 1\n- text: two\n", "is YAML, .*fmt=text"),
    ("a.txt", b'[a]\ntext = "one"\nid = 1\n', "is settings"),
    ("a.txt", b"WEBVTT\n\n00:01.000", "is subtitles"),
    ("a.txt", b"1\n00:00:01,000 --> 00:00:02,000\nHi\n", "is subtitles"),
    ("a.txt", b"-- a dump\n\nINSERT INTO t VALUES (1);", "is SQL"),
    ("a.txt", b"@article{key,\n  title = {X},\n}", "BibTeX"),
    ("a.txt", b"WARC/1.0\r\nWARC-Type: response", "web archive"),
    ("a.warc.gz", gzip.compress(b"WARC/1.0\r\n", mtime=0), r"\.warc files are not read; unpack it"),
    ("a.txt", b"From a@b.c Mon Jan  1 00:00:00 2001\n", "is a mail box"),
    ("a.txt", b'data: {"text": "one"}\n\ndata: {}', "is events"),
    ("a.txt", b"{'text': 'one'}\n{'text': 'two'}", r"is Python's notation .*json\.dumps"),
    ("a.br", b"x", r"\.br files are not read; unpack it and give the files in it$"),
    ("a.gz", gzip.compress(bz2.compress(b"one"), mtime=0), "packed twice .*bz2"),
    ("a.lzma", lzma.compress(b"one", format=lzma.FORMAT_ALONE), "packed by lzma, .*unlzma FILE"),
    ("a.parquet", b"prose", r"is not parquet, which its suffix says.*fmt=text"),
    ("a.txt", b'"doc 1\\nmore"\n"doc 2"\n', "line 1 is str, not a row of fields"),
    ("a.json", b'["one"]', r"not a row of fields.*write each as \{\"text\": \"\.\.\.\"\}, one a line"),
    (
        "a.txt",
        "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440".encode("utf-16-le"),
        "is UTF-16LE .*iconv -f UTF-16LE",
    ),
    ("a.txt", "\u4f60\u597d\u4e16\n\u754c".encode("utf-16-be"), "is UTF-16BE .*iconv -f UTF-16BE"),
    ("a.txt", "\u4f60\u597d\u4e16\u754c".encode("gb18030"), "iconv -f ENCODING .*these fit: GB18030"),
    ("a.mp3", b"ID3\xf1\n\0\0", r"binary \(.*: byte 3, line 1\)"),
    ("a.txt", "one\ntwo".encode("utf-16-le"), r"is UTF-16LE .*iconv -f UTF-16LE -t UTF-8 a\.txt > a\.utf8\.txt"),
    ("a.txt", "one\ntwo".encode("utf-32-be"), "iconv -f UTF-32BE"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "d\xe9"}',
        r"byte 25, line 2: 0xe9.*if it is ISO-8859-1, iconv -f ISO-8859-1",
    ),
    ("a.txt", b"\x93quoted\x94", r"byte 0, line 1: 0x93.*iconv -f WINDOWS-1252 -t UTF-8 a\.txt"),
    ("a.txt", "caf\u00e9".encode()[:-1], "if its end is cut off, fetch it again"),
    (
        "a.txt.gz",
        gzip.compress(b"caf\xe9", mtime=0),
        r"unpack it, then iconv -f ISO-8859-1 -t UTF-8 a\.txt > a\.txt\.utf8",
    ),
    ("a.txt", b"\xff\xfeo\0n\0e\0\n\0x", "begins as UTF-16 and is not"),
    ("a.txt", _TORN[:69_000].encode(), "item 1 is not JSON|line 1 is not JSON"),
    ("a.txt", b'{"text": "a",}\n{"text": "b"}\n', r"line 1 is not JSON.*fmt=text"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": nope}\n', "line 3 is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"line 2: field 'text' is null; take such rows out"),
    ("a.jsonl", b'{"text": 3, "body": "a"}', r"line 1: field 'text' is int, not text; .*\['body'\]"),
    ("a.jsonl", b'{"text": ["a", 1]}\n{"text": "b"}', "line 1: field 'text' is list"),
    ("a.jsonl", b'{"text": "a"}\n"b"\n', "line 2 is str, not a row"),
    ("a.json", b'[{"text": "a"}, {"text": null}]', "item 2: field 'text' is null"),
    ("a.json", b'[{"text": "a"}, {"text": ', "item 2 is not JSON"),
    ("a.json", b'[{"text": "a"}', "item 1 is not JSON"),
    ("a.json", b'[{"text": "a"} {"text": "b"}]', "item 1 is not JSON"),
    ("a.json", b'[{"text": "a"}]\n{"text": "b"}', "more follows"),
    ("a.json", b'["a", "b"]', "item 1 is str, not a row of fields"),
    (
        "a.json",
        b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}',
        r"several lists, \['a', 'b'\].*jq -c '\.\[\"a\"\]\[\]'",
    ),
    ("a.json", b'{"rows": [{"text": "x"}, {"text": null}]}', r"rows\[1\]: field 'text' is null"),
    *[("a.txt", content, f"{message}.*fmt=text") for content, message in _STRUCTURED],
    *[
        (f"a{suffix}", b"prose", f"{suffix} files are not read")
        for suffix in (".po", ".ass", ".lrc", ".sbv", ".properties")
    ],
    ("a.csv", b"id,body\n1,a\n", r"line 1, has no field 'text', only \['id', 'body'\]; set data\.source\.field"),
    ("a.csv", b"id,text\n1,a\n2,b,c\n", "line 3 has 3 cells where the header has 2"),
    ("a.csv", b'id,text\n1,"a\n2,b\n', "separated .*quotes"),
    ("a.csv", b"text,text\na,b\n", "stands twice"),
    ("a.tsv", _QUOTES, r"lines 2 to 4 are one row by their quotes and 3 rows without; .*quoting=3"),
    ("a.txt", _QUOTES, "lines 2 to 4 are one row by their quotes"),
    ("a.csv", _QUOTES.replace(b"\t", b"|").replace(b"2|", b"\n2|"), r"lines 2 to 5 are .*sep='\|', quoting=3"),
    ("a.tsv", b'id\ttext\n1\t"a" b\n', r"line 2 is not '\\t'-separated .*quoting=3"),
    (
        "a.json",
        b'{"info": [{"id": 1}], "docs": [{"text": "x"}]}',
        r"several lists, \['info', 'docs'\].*jq -c '\.\[\"docs\"\]\[\]'",
    ),
    ("a.json", b'{"info": [{"id": 1}], "in": {"docs": [{"text": "x"}]}}', r"jq -c '\.\[\"in\"\]\[\"docs\"\]\[\]'"),
    ("a.json", b'{"in": {"docs": [{"text": "x"}]}}', r"a list further inside.*jq -c '\.\[\"in\"\]\[\"docs\"\]\[\]'"),
]


@pytest.mark.parametrize(("name", "content", "message"), _REFUSED)
def test_what_is_not_read_is_named_with_a_fix(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_file(tmp_path / name, "auto", "text"))
    assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ValueError, match=r".") as caught:  # of another reader, what is said helps there
        read_text(tmp_path / name, 1_000_000)
    assert "data.source" not in str(caught.value)


def test_what_is_there_and_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "b.txt")
    for name, message in {"a.txt": "is a link to .*gone, where nothing is", "b.txt": "is no plain file"}.items():
        with pytest.raises(ValueError, match=rf"data\.path={tmp_path / name} {message}"):
            find_files(str(tmp_path / name), "data.path")


def test_null_rows_of_a_table_are_named_by_row(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    bad = {r"row 2: field 'text' is null.*dropna": ["a", None], r"row 1: .* is bytes.*\.str\.decode\('utf-8'\)": [b"a"]}
    for message, texts in bad.items():
        parquet.write_table(pytest.importorskip("pyarrow").table({"text": texts}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=rf"a\.parquet, {message}"):
            list(read_file(tmp_path / "a.parquet", "auto", "text"))


def test_what_needs_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"a.parquet": _arrow("parquet"), "a.arrow": _arrow("file"), "a.jsonl.zst": _zstd(_LINES.encode())}
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} .*needs the package pyarrow.*iskd\[data\]"):
            list(read_file(tmp_path / name, "auto", "text"))


def test_what_the_user_says_of_a_text_holds(tmp_path: Path) -> None:
    for name, content in {"a.csv": "a,b\n1,2", "a.html": "<html><p>x", "a.json": '{"a": 1}'}.items():
        (tmp_path / name).write_text(content)
        assert list(read_file(tmp_path / name, "text", "text")) == [content]
    (tmp_path / "c.csv").write_text('"text"\n"C:\\new"\n')
    assert list(read_file(tmp_path / "c.csv", "auto", "text")) == ["C:\\new"]
    (tmp_path / "b.txt").write_text(_table(","))
    assert list(read_file(tmp_path / "b.txt", "csv", "text")) == _DOCUMENTS


def _fill(folder: Path, names: str) -> None:
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("a.txt b/c.jsonl README.md b/LICENSE .hidden .git/x.txt", "a.txt b/c.jsonl"),
        ("a.py b/c.py Makefile README.md", "Makefile a.py b/c.py"),
        ("a.csv b.tsv.bz2 c.json.zst d.feather", "a.csv b.tsv.bz2 c.json.zst d.feather"),
    ],
)
def test_a_folder_leaves_out_what_lies_beside_text(
    tmp_path: Path, names: str, found: str, caplog: pytest.LogCaptureFixture
) -> None:
    _fill(tmp_path, names)
    caplog.set_level(logging.INFO, "iskd")
    files = find_files(str(tmp_path), "data.path")
    assert [str(file.relative_to(tmp_path)) for file in files] == found.split()
    assert ("are left out" in caplog.text) is ("README" in names)
    assert find_files(f"{tmp_path.parent}/{tmp_path.name[:-1]}?", "data.path") == files  # a glob of folders


def test_a_folder_drops_no_file_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _fill(tmp_path, "a.txt b/c.md d.png e.png")
    with pytest.raises(ValueError, match=r"3 of its 4 files .*2 x \.png, 1 x \.md.*by a glob, as data\.path='.*\.txt'"):
        find_files(str(tmp_path), "data.path")
    assert find_files(f"{tmp_path}/[ab]*", "data.path") == [tmp_path / "a.txt"]
    assert "1 folders (b) are left out: ** goes into folders too" in caplog.text
    _fill(tmp_path / "linked", "a.txt")
    (tmp_path / "linked" / "more").symlink_to(tmp_path / "b")
    with pytest.raises(ValueError, match=r"the first is .*more"):
        find_files(str(tmp_path / "linked"), "data.path")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (
            "train-00000-of-00001.jsonl test-00000-of-00001.jsonl",
            "test-00000-of-00001.jsonl train-00000-of-00001.jsonl",
        ),
        ("data/train.txt.gz data/validation.txt data/Test_1.txt", "Test_1.txt validation.txt train.txt.gz"),
        ("train/a.txt dev/a.txt", "dev/a.txt train/a.txt"),
        ("train.csv trainers.csv", None),
        ("test.txt valid.txt", None),
        ("train.py test.py", None),
        ("trains.txt testament.txt train.txt", None),
    ],
)
def test_names_of_files_are_splits(
    tmp_path: Path, names: str, found: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    _fill(tmp_path, names)
    caplog.set_level(logging.INFO, "iskd")
    for path in (str(tmp_path), f"{tmp_path}/**/*.*"):
        splits = find_splits(path, "data.path")
        assert ("splits by the names of files: train 1 files" in caplog.text) is (found is not None)
        if found is None:
            assert [split for split, _ in splits] == [None]
            continue
        assert splits[-1][0] is None
        files = [file for _, files in splits for file in files]
        assert [str(file)[-len(name) :] for file, name in zip(files, found.split(), strict=True)] == found.split()
        with pytest.raises(ValueError, match=rf"holds several splits; name one: eval\.text={files[-1].parent}"):
            find_files(path, "eval.text")
        with pytest.raises(ValueError, match=rf"of its own beside .*data\.path={files[-1].parent}"):
            placed_files(path, str(files[0]), str(files[0]))
        assert placed_files(str(files[-1]), str(files[0]), None)["val_path"]


def test_files_of_no_split_beside_splits_are_named(tmp_path: Path) -> None:
    _fill(tmp_path, "train-0.csv train-1.csv test.csv sample_submission.csv")
    fix = rf"data\.path={tmp_path}/train\* data\.test_path={tmp_path}/test\.csv"
    with pytest.raises(ValueError, match=rf"1 of none \(the first is sample_submission\.csv\): .* {fix}"):
        find_files(str(tmp_path), "data.path")
    assert len(find_files(f"{tmp_path}/train*", "data.path")) == 2


def test_folders_of_saved_data_sets_open(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        _fill(tmp_path / split, "dataset_info.json state.json cache-1f.arrow")
        (tmp_path / split / "data-00000-of-00001.arrow").write_bytes(_arrow("stream"))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    splits = [split for _, split in TextFiles(str(tmp_path)).documents()]
    assert splits == ["validation"] * 3 + ["test"] * 3 + [None] * 3
    assert read_text(tmp_path / "test", 1_000_000) == _DOCUMENTS
    with pytest.raises(ValueError, match=r"holds several splits; name one: eval\.text=.*/test"):
        read_text(tmp_path, 10)
    with pytest.raises(ValueError, match=r"has a split validation of its own beside data\.val_path"):
        list(TextFiles(str(tmp_path), val_path=str(tmp_path / "test")).documents())
    with pytest.raises(ValueError, match=r"save_to_disk: set data=text data\.path="):
        list(HubDataset(str(tmp_path)).documents())
    (tmp_path / "train" / "data-00000-of-00001.arrow").rename(tmp_path / "train" / "data-00000-of-00002.arrow")
    with pytest.raises(ValueError, match=r"no whole saved data set: it has 1 of 2 files"):
        TextFiles(str(tmp_path)).fingerprint()
    (tmp_path / "dataset_dict.json").unlink()
    with pytest.raises(ValueError, match=r"holds 3 saved data sets; name one, as data\.path=.*/test"):
        TextFiles(str(tmp_path)).fingerprint()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "odd"]}')
    with pytest.raises(ValueError, match=r"\['odd'\]; name one, as data\.path=.*odd"):
        TextFiles(str(tmp_path)).fingerprint()


def test_only_what_was_read_otherwise_before_has_a_new_fingerprint(tmp_path: Path) -> None:
    """Shards of a `.json` file that 0.1 read as prose are not taken up; those of files read as ever are."""
    for name, same in {"a.txt": True, "a.jsonl": True, "a.md": True, "a.json": False, "b.txt": False}.items():
        (tmp_path / name).write_text("prose" if name in ("a.txt", "a.md") else _LINES)
        assert (TextFiles(str(tmp_path / name)).fingerprint().count("-") == 2) is same, name
    assert TextFiles(str(tmp_path / "a.json"), fmt="jsonl").fingerprint().count("-") == 2
    prose = TextFiles(str(tmp_path / "a.json"), fmt="text").fingerprint()
    assert TextFiles(str(tmp_path / "a.json")).fingerprint() != prose

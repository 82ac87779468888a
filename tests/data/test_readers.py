"""`iskd.data.readers`: structured files are read by field or refused by name, never as prose."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from iskd.data.readers import find_files, read_file

_LINES = "\n".join(json.dumps({"text": f"Document {i}.", "url": "u"}) for i in range(3))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.JSON", "a.json.gz", "a.jsonl.gz"])
def test_json_lines_are_read_by_field_under_every_suffix(tmp_path: Path, name: str) -> None:
    content = _LINES.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (file,) = find_files(str(tmp_path), "data.path")
    assert list(read_file(file, "auto", "text")) == ["Document 0.", "Document 1.", "Document 2."]


@pytest.mark.parametrize(
    "name", ["a.csv", "a.csv.gz", "a.html", "a.XML", "a.pdf", "a.json.zst", "a.json.bz2", "a.arrow"]
)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text,url\nfoo,bar\n")
    with pytest.raises(ValueError, match=r"files are not read; convert it"):
        list(read_file(tmp_path / name, "auto", "text"))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_no_prose(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "foo"}], indent=indent))
    with pytest.raises(ValueError, match=r"a\.json, line 1 begins a JSON array"):
        list(read_file(tmp_path / "a.json", "auto", "text"))

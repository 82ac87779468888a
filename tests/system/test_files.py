"""A file is written whole or not at all, never through a link, with the permissions that the umask leaves."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from iskd.system import files


@pytest.mark.parametrize("content", ["ends\r\nas they are\n", b"\x89PNG\r\n", "caf\u00e9"])
def test_content_is_kept_to_the_byte(content: str | bytes, tmp_path: Path) -> None:
    file = files.write_whole(tmp_path / "file", content)
    assert file == tmp_path / "file"
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        file = files.write_whole(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_link_in_the_place_of_the_draft_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    monkeypatch.setattr(files, "uuid4", lambda: SimpleNamespace(hex="guessed"))
    (tmp_path / ".file.guessed.draft").symlink_to(outside)
    with pytest.raises(FileExistsError):
        files.write_whole(tmp_path / "file", "ours")
    assert outside.read_text() == "theirs"
    assert not (tmp_path / "file").exists()


def test_a_full_disk_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = files.write_whole(tmp_path / "file", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [["name", "value"], ['a "quoted", name', "1.5"], ["two\nlines", ""]]
    with files.write_csv(tmp_path / "rows.csv", rows).open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == rows

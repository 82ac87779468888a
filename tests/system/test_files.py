"""A file is written whole or not at all, never through a link, with the permissions that the umask leaves."""

from __future__ import annotations

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


def test_a_place_is_cleared_and_no_link_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("theirs")
    place = tmp_path / "place"
    for put in (lambda: place.symlink_to("outside"), lambda: place.symlink_to("none"), place.mkdir, place.touch, str):
        put()
        files.clear_place(place)
        assert not place.is_symlink()
        assert not place.exists()
    assert (tmp_path / "outside" / "kept").read_text() == "theirs"


def test_only_a_plain_file_within_its_folder_is_read(tmp_path: Path) -> None:
    """A link out of it may name any file of whoever opens the folder; an endless one, or a pipe, has no end."""
    folder, outside = tmp_path / "run", tmp_path / "credentials.json"
    folder.mkdir()
    outside.write_text("{}")
    (folder / "plain").write_text("{}")
    for name, target in {"in": "plain", "out": outside, "up": "../credentials.json", "endless": "/dev/zero"}.items():
        (folder / name).symlink_to(target)
    (folder / "over").symlink_to("out")
    (folder / "round").symlink_to("round")
    os.mkfifo(folder / "pipe")
    for name in ("plain", "in"):
        assert files.read_json(folder / name) == {}
    for name in ("out", "up", "over", "endless", "pipe", "round"):
        with pytest.raises((ValueError, OSError), match=r"link out of its folder|not a plain file|symbolic links"):
            files.read_json(folder / name)
    assert files.read_json(folder / "out", links=True) == {}
    for name in ("endless", "pipe"):
        with pytest.raises(ValueError, match="not a plain file"):
            files.read_json(folder / name, links=True)
    with pytest.raises(ValueError, match="more than the 1 that"):
        files.read_plain(folder / "plain", max_bytes=1)
    with pytest.raises(ValueError, match="more than the 9 that"):  # a file of the kernel that says it has no byte
        files.read_plain(Path("/proc/self/status"), max_bytes=9)


def test_a_snapshot_of_the_hub_is_one_folder(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "4567").write_text("[1]")
    (snapshot / "record.json").symlink_to("../../blobs/4567")
    assert files.read_json(snapshot / "record.json") == [1]

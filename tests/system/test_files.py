"""A file is written whole or not at all, never through a link, with the permissions that the umask leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from iskd.commands.build.folder import claim
from iskd.export import export
from iskd.plan import Record
from iskd.system import files
from tests.runs import make_parts, write_text


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
    files.draft_of(tmp_path / "file").symlink_to(outside)
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


# Loads the one file that says how drafts are named, makes a folder and a file of its own, and is killed over them.
KILLED = """
import importlib.util, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
sys.modules["files"] = files
spec.loader.exec_module(files)
root = Path(sys.argv[2])
def stopped(*_):
    print("ready", flush=True)
    time.sleep(600)
os.replace = stopped
with files.scratch("shards", root) as folder:
    (folder / "train.bin").write_bytes(b"tokens")
    files.write_whole(root / "record.json", "half")
"""


def drafts(folder: Path) -> list[str]:
    return sorted(path.name.split(".")[1] for path in folder.glob(".*.draft"))


def test_what_a_killed_process_left_is_swept_and_not_what_a_living_one_makes(tmp_path: Path) -> None:
    """Also while the killed one waits for its parent, and where another process has its number by now."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    place = tmp_path / "place"
    place.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(files.__file__), str(place)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with files.scratch("mine", place) as mine:
            assert drafts(place) == ["mine", "record", "shards"], "both live"
            number, began = os.getpid(), files._began(os.getpid())
            again = mine.with_name(mine.name.replace(f"-{number}-{began}-", f"-{number}-{(began or 0) - 1}-"))
            again.symlink_to(outside)
            files.sweep(place)
            assert drafts(place) == ["mine", "record", "shards"], "the link was of an earlier process"
            other.kill()
            while files._began(other.pid):
                time.sleep(0.001)
            files.sweep(place)
            assert drafts(place) == ["mine"]
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert not list(place.iterdir())
    assert (outside / "kept").is_file()


@pytest.mark.parametrize("name", [".run.0f0f0f0f-1-1-0123456789ab.draft", ".model.draft", ".0123456789abcdef.ab_cd012"])
def test_what_nothing_is_known_of_goes_by_age(name: str, tmp_path: Path) -> None:
    """Of another machine, or of a version that did not say: a day after the last change of what lies in it."""
    draft, inside = tmp_path / name, tmp_path / name / "train.bin"
    draft.mkdir()
    for kept in (".gitignore", "record.json.draft", ".draft", ".0123456789abcdef.lock", ".draft-000001-stage"):
        (tmp_path / kept).touch()
        os.utime(tmp_path / kept, (0, 0))
    inside.touch()
    os.utime(draft, (0, 0))
    files.sweep(tmp_path)
    assert inside.is_file()
    os.utime(inside, (0, 0))
    os.utime(draft, (0, 0))
    files.sweep(tmp_path)
    assert not draft.exists()
    assert len(list(tmp_path.iterdir())) == 5
    files.sweep(tmp_path / "none")


def test_every_start_sweeps_where_it_will_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a run, token shards, the folder beside an export, the system's temporary files."""
    run_dir, cache, temporary = (tmp_path / name for name in ("run", "cache", "temporary"))
    dead = f".x.{files._machine()}-{2**22 + 1}-1-0123456789ab.draft"  # above the largest process number

    def put(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / dead).mkdir()

    for folder in (run_dir, cache, temporary):
        put(folder)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(temporary))
    parts = make_parts(run_dir, write_text(tmp_path), cache)
    claim(run_dir, False)
    parts.data.prepare()
    with files.scratch("mine"):
        assert drafts(temporary) == ["mine"]
    assert drafts(run_dir) == drafts(cache) == []
    put(run_dir)
    model = parts.teacher.model
    export(run_dir / "model", model, Record(4), model.config, verify=False)
    assert drafts(run_dir) == []

"""One process at a time in a run's folder, whatever lies there."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from iskd.system import run_lock

HOLD = """
import fcntl, json, os, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
json.dump({"process": os.getpid(), "machine": "node7", "since": "2026-01-02 03:04:05"}, file)
print("held", file=file.flush() or sys.stdout, flush=True)
sys.stdin.read()
"""
"""A run on another node, without the seconds that its imports take."""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", run_lock.HANDED_ON):
        monkeypatch.delenv(name, raising=False)
    yield
    for file in [*run_lock._held]:
        run_lock.release(file)


def test_a_living_process_keeps_others_out_and_a_killed_one_does_not(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"process {other.pid} on node7, since 2026.*give the same command again"):
            run_lock.hold(lock)
    finally:
        other.kill()
        other.communicate()
    assert run_lock.hold(lock)
    assert not run_lock.hold(lock)  # a process that holds it may hold it again
    assert json.loads(lock.read_text())["process"] == os.getpid()
    with lock.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    run_lock.release(lock)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_process_in_its_place_has_the_lock_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, environment = tmp_path / "run.lock", dict[str, str]()
    run_lock.hold(lock)
    run_lock.hand_on(lock, environment)
    opened = int(environment[run_lock.HANDED_ON])
    run_lock._held.clear()  # a fresh process knows nothing of it
    monkeypatch.setenv(run_lock.HANDED_ON, str(opened))
    run_lock.hold(lock)
    assert run_lock._held == {lock: opened}
    assert not os.get_inheritable(opened)
    assert run_lock.HANDED_ON not in os.environ, "a child would take its own file for it"
    for said in ("999", str(os.open(tmp_path, os.O_RDONLY)), "-1", "x"):  # closed, of something else, none
        monkeypatch.setenv(run_lock.HANDED_ON, said)
        run_lock._held.clear()
        with pytest.raises(ValueError, match="in use"):
            run_lock.hold(lock)
    os.close(opened)


def test_whatever_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "stale.lock"
    stale.write_text(json.dumps({"process": 1, "machine": "gone", "since": "2020-01-01 00:00:00"}))
    run_lock.hold(stale)
    outside = tmp_path / "outside"
    outside.write_text("kept")
    (tmp_path / "link.lock").symlink_to(outside)
    os.mkfifo(tmp_path / "pipe.lock")
    for name in ("link.lock", "pipe.lock"):
        with pytest.raises(ValueError, match=r"not a plain file: delete it"):
            run_lock.hold(tmp_path / name)
    assert outside.read_text() == "kept"
    monkeypatch.setenv("RANK", "1")  # rank 0 holds it for all
    run_lock.hold(tmp_path / "other.lock")
    assert not (tmp_path / "other.lock").exists()


@pytest.mark.parametrize(
    "said", ["", "[", "[]", '{"process": "x"}', '{"process": 1, "machine": "\\u001b[2J", "since": 3}', "{\0}\0"]
)
def test_an_owner_that_cannot_be_read_is_another_process(said: str, tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    lock.write_text(said)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"is in use by another (process|run)") as refused:
            run_lock.hold(lock)
    assert "\x1b" not in str(refused.value)


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    assert run_lock.hold(tmp_path / "run.lock")
    assert "has no locks" in caplog.text
    assert not run_lock._held

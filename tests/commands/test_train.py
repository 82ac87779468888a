"""A job of a sweep in a process of its own: what asks either to stop ends both, with the code that tells why."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from iskd.commands import train as fresh_process
from iskd.system import Preempted
from iskd.system.faults import RunError
from iskd.system.stop_signals import EXIT_CODE, INTERRUPTED

# {1} is sent to the waiting process, if any; the child ends with {0}, or with 143 once it was asked to stop.
CHILD = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if {1}:
    os.kill(os.getppid(), {1})
    time.sleep(20)
sys.exit({0})
"""


@pytest.mark.parametrize(
    ("code", "number", "expected"),
    [
        (INTERRUPTED, 0, INTERRUPTED),
        (EXIT_CODE, 0, EXIT_CODE),
        (0, signal.SIGTERM, EXIT_CODE),
        (0, signal.SIGUSR1, EXIT_CODE),
        (0, signal.SIGINT, INTERRUPTED),
    ],
)
def test_a_job_that_was_stopped_stops_its_sweep(
    code: int, number: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_process, "_ENTRY", (sys.executable, "-S", "-c", CHILD.format(code, int(number))))
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(Preempted) as stop:
        fresh_process.in_a_child(tmp_path, None, [])
    assert stop.value.code == expected
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_job_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_process, "_ENTRY", (sys.executable, "-S", "-c", CHILD.format(3, 0)))
    with pytest.raises(RunError, match=f"the run in {tmp_path} ended with code 3"):
        fresh_process.in_a_child(tmp_path, None, [])

"""Progress lines of long work, of unknown length (`Busy`) and of known length (`ProgressLine`).

Both write to standard error, so that what a command prints can be piped, and nothing while the work is short. On a
terminal a counted line moves; a log gets whole lines, seldom. (A bar of tqdm parts its lines by carriage returns in a
log too, waits there for its whole interval before the first one, and starts its delay anew with every bar, so that many
short tasks in a row would stay silent.)
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

_LIVE_S = 0.2  # seconds between changes of a line on a terminal


class Busy:
    """Progress of work whose length nobody knows: a thread says now and then how many seconds it takes so far.

    Args:
        what: what is going on.
        stream: where to write; None = standard error.
        first: seconds without a line.
        every: seconds between lines.
        expected: how many seconds it took the last time, or was promised to take; None = nobody knows.
    """

    def __init__(
        self,
        what: str,
        stream: TextIO | None = None,
        *,
        first: float = 2.0,
        every: float = 5.0,
        expected: float | None = None,
    ) -> None:
        self._expected = expected
        self._what, self._stream = what, sys.stderr if stream is None else stream
        self._first, self._every = first, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="busy", daemon=True)

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """No line comes after this."""
        self._done.set()
        self._thread.join()

    def _tell(self) -> None:
        start, wait = time.monotonic(), self._first
        while not self._done.wait(wait):
            passed = time.monotonic() - start
            self._stream.write(f"{self._what}: {passed:,.0f} s so far{self._left(passed)}\n")
            self._stream.flush()
            wait = self._every

    def _left(self, passed: float) -> str:
        if self._expected is None:
            return ""
        left = self._expected - passed
        return f", about {left:,.0f} s left" if left > 0 else f", longer than the {self._expected:,.0f} s expected"


class ProgressLine:
    """Progress of work that is counted: done, total and seconds left, as the worker reports them.

    Args:
        stream: where to write; None = standard error.
        first: seconds without a line.
        every: seconds between lines when there is no terminal.
    """

    def __init__(self, stream: TextIO | None = None, *, first: float = 2.0, every: float = 5.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._every = _LIVE_S if self._live else every
        self._what, self._started = "", time.monotonic()
        self._last = self._started
        self._next = self._started + first

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clear the line, so that what follows is readable."""
        if self._live:
            self._write("\r\x1b[K")

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say how far `what` is: `done` of `total` in any unit. What came before ended with its last call."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._started = what, self._last
        self._last = now
        if now < self._next:
            return
        self._next = now + self._every
        left = f", {(now - self._started) / done * (total - done):,.0f} s left" if done else ""
        text = f"{what}: {done:,}/{total:,}{left}"
        self._write(f"\r\x1b[K{text}" if self._live else f"{text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

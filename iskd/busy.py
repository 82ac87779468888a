"""Lines about work that cannot say how far it is, such as loading a model or writing one: that it is going on."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO


class Busy:
    """While the context lasts: nothing for the first seconds, then a line now and then with the seconds so far.

    Args:
        what: what is going on.
        stream: where to write; None = standard error.
        first: seconds without a line.
        every: seconds between lines.
    """

    def __init__(self, what: str, stream: TextIO | None = None, *, first: float = 2.0, every: float = 15.0) -> None:
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
            self._stream.write(f"{self._what}: {time.monotonic() - start:,.0f} s so far\n")
            self._stream.flush()
            wait = self._every

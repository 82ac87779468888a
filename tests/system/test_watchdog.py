"""Who is named when a collective fails before the watching thread has seen a process die."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Queue
from typing import Any, cast

import pytest

from iskd.system.ranks import Ranks
from iskd.system.watchdog import Watchdog


@dataclass
class _Ranks:
    """Two processes that are threads: what rank 0 tells all goes through a queue."""

    rank: int
    told: Queue[Any]
    size: int = 2

    def first(self, value: Any) -> Any:
        if self.rank == 0:
            self.told.put(value)
            return value
        return self.told.get(timeout=30)


def _pair() -> tuple[Watchdog, Watchdog]:
    told: Queue[Any] = Queue()
    first, second = (Watchdog(cast(Ranks, _Ranks(rank, told)), "Go on.") for rank in (0, 1))
    other = threading.Thread(target=second.start)
    other.start()
    first.start()
    other.join()
    return first, second


def _vanish(watchdog: Watchdog) -> None:
    """What the kernel does with a process that is killed: its connections end without a word."""
    for peer in watchdog._peers:
        peer.close()
    watchdog._peers = {}


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (_vanish, "rank 1 died, so rank 0 stops as well; see the last lines of rank 1 for the reason. Go on.\n"),
        (lambda watchdog: watchdog.close(failed=True), ""),
        (lambda watchdog: watchdog.close(), ""),
    ],
)
def test_a_failed_process_names_the_one_that_died_meanwhile(
    end: Callable[[Watchdog], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = _pair()
    assert second._wake is not None
    if end is _vanish:
        second._wake.close()  # its watching thread ends with it
    later = threading.Timer(0.2, end, (second,))
    later.start()
    first.close(failed=True)
    later.join()
    assert capsys.readouterr().err == said
    first.close()
    second.close()

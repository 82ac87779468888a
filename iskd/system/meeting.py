"""The processes of a run meet, within a bounded time, before torch lets them wait for each other for half an hour.

A process that dies while it loads a teacher or refuses its config never comes to the process group; torch's own wait
for it is that of a collective, which has to be long. Here each leaves its name in a store on rank 0's machine, at the
address where the process group will be made, and waits for the names of all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, TCPStore

LIMIT = "ISKD_MEET_SECONDS"
"""Environment variable: seconds that the first process waits for the last one."""
_SECONDS = 300.0
_EACH = 1.0


def met(rank: int, size: int, host: str, port: int, join: Callable[[], None]) -> None:
    """Wait for all processes, then `join` them.

    Args:
        rank: of this process.
        size: how many there are.
        host: address of rank 0's machine.
        port: where its store listens, the process group's after it.
        join: makes the process group; the store lives as long.

    Raises:
        TimeoutError: some did not come, with their ranks.
        ValueError: `ISKD_MEET_SECONDS` is no number above 0.
    """
    if size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        join()  # the agent of torchrun holds the store, and ends who is left
        return
    seconds = _limit()
    deadline = time.monotonic() + seconds
    try:
        store = TCPStore(
            host, port, size, rank == 0, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True
        )
        store.set(f"iskd/{rank}", "here")
        missing = set(range(size)) - {rank}
        while missing:
            missing = {other for other in missing if not store.check([f"iskd/{other}"])}
            if missing and time.monotonic() > deadline:
                raise _late(missing, seconds, host, port)
            time.sleep(_EACH / 10 if missing else 0)
    except DistError as error:
        if rank == 0:  # its own port
            raise
        raise _late({0}, seconds, host, port) from error
    join()


def _late(missing: set[int], seconds: float, host: str, port: int) -> TimeoutError:
    who = f"rank {', '.join(map(str, sorted(missing)))}"
    return TimeoutError(
        f"{who} did not come to {host}:{port} within {seconds:g} s: it ended before training began (see its last "
        f"lines), cannot reach that address, or needs longer to load ({LIMIT}=SECONDS)"
    )


def _limit() -> float:
    said = os.environ.get(LIMIT, str(_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{LIMIT}={said!r:.40}: set it to a number of seconds, or unset it")
    return seconds

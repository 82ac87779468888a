"""Fitting what a library lacks, alone or with other processes.

Process r of n takes the layers r, r + n, ... The first one then waits for the others' files; the library on disk is all
that they have in common.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence

from iskd.schedules.budget.fitting import Jobs
from iskd.schedules.budget.library import Library
from iskd.schedules.budget.options import Option, layers_of

_PATIENCE_S = 1800.0
_WAIT_S = 1.0
_log = logging.getLogger(__name__)


def fill(
    library: Library,
    options: Sequence[Option],
    process: int,
    processes: int,
    told: Callable[[str, int, int], None],
    note: Callable[[str], None],
    fit: Callable[[Jobs, Callable[[], None]], None],
) -> None:
    """Fit this process's layers, and on the first one, what others owe in the end.

    Args:
        library: to be filled.
        options: wanted of every layer.
        process: which one this is, from 0.
        processes: how many there are.
        told: called with what is being done, how much of it is done, and of how much.
        note: called with sentences for people.
        fit: fits options by layer and keeps them, and calls its second argument before each.
    """
    depth = len(library.stack.layers)

    def make(layers: Collection[int]) -> None:
        jobs = {layer: lacking for layer, lacking in library.missing(options).items() if layer in layers}
        count, done = sum(map(len, jobs.values())), 0

        def tell() -> None:
            nonlocal done
            told("fitting options", done, count)
            done += 1

        fit(jobs, tell)

    every = range(depth)
    make(every[process::processes])
    if process or processes == 1:
        return
    waiting, last, left = time.monotonic(), -1, 0
    if others := _files_missing(library, options):
        note(f"waiting for {others} options, which the other {processes - 1} of {processes} processes fit")
    while left := _files_missing(library, options):
        told("waiting for other processes", others - left, others)
        if left != last:
            last, waiting = left, time.monotonic()
        if time.monotonic() - waiting > _PATIENCE_S:
            _log.warning("the other processes have not fitted %d options for half an hour: this one does", left)
            break
        time.sleep(_WAIT_S)
    make(every)


def _files_missing(library: Library, options: Sequence[Option]) -> int:
    return sum(
        not library.file(layer, option).exists()
        for option in options
        if option.fitted
        for layer in layers_of(option, library.stack)
    )

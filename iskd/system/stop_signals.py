"""Stop signals of a batch system: note them, save at the next optimizer step, leave with a code of its own.

SLURM and others announce the end of a job with a signal and kill it a little later; a user presses Ctrl-C. A handler
runs between any two bytecodes, on every rank at another time, so it must neither save nor talk to other ranks: it sets
a mark, which the training loop reads at optimizer steps. Where nothing is left to save and one process works alone (the
student is written and measured), it ends that work at once (`StopSignals.at_once`). The exit code 143 (128 + SIGTERM,
what a shell reports of a process that SIGTERM ended) tells a supervisor: everything is saved, start again with
`resume=`; after Ctrl-C it is 130. A second Ctrl-C is not waited for: the system ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from iskd.system.ranks import global_rank
from iskd.system.text import argument

EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C."""
_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")

Handler = Callable[[int, FrameType | None], Any] | int | None


class Preempted(SystemExit):
    """A run that stopped because it was asked to, with everything saved; ends the process with code 143, or 130.

    Processes other than rank 0 end with code 0: Lightning and some clusters kill rank 0 as soon as another process
    fails, perhaps before the job is queued again.

    Args:
        run_dir: folder of the run.
        asked_by: who asked; None = a signal.
        number: of the signal; SIGINT is Ctrl-C, with a code of its own.

    Attributes:
        message: what happened and how to continue, for the log.
    """

    def __init__(self, run_dir: Path, asked_by: str | None = None, number: int | None = None) -> None:
        by_user = number == signal.SIGINT
        super().__init__((INTERRUPTED if by_user else EXIT_CODE) if global_rank() == 0 else 0)
        self.message = (
            f"stopped by {asked_by or ('Ctrl-C' if by_user else 'a signal')}, everything is saved: "
            f"continue with {argument('resume', run_dir)}"
        )


class StopSignals:
    """Ctrl-C, SIGTERM, SIGUSR1 and the preemption signal of a submitit job, as a mark to look at."""

    def __init__(self) -> None:
        self._received: tuple[int, ...] = ()
        self._saved: Path | None = None
        self._broken: type[BaseException] | None = None
        self._before: dict[int, Handler] = {}

    @property
    def received(self) -> int | None:
        """Number of the first stop signal that arrived, or None."""
        return self._received[0] if self._received else None

    def install(self) -> None:
        """Take over the signals; does nothing outside the main thread, where Python allows no handlers.

        Lightning's own are kept out (`iskd.system.patches.without_signal_handlers`). What is remembered for `hand_on`
        and `uninstall` stays what was there at the first call.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in stop_signals():
            if number in self._received and number == signal.SIGINT:
                continue  # a second Ctrl-C ends the process
            found = signal.getsignal(number)
            if number not in self._before:
                self._before[number] = signal.SIG_DFL if found is None or _of_lightning(found) else found
            signal.signal(number, self._note)

    @contextmanager
    def at_once(self, run_dir: Path) -> Iterator[None]:
        """Inside, everything is saved and this process works alone: a stop signal raises `Preempted` here.

        Every file is written whole or not at all, so that it may come between any two bytecodes.
        """
        self._saved = run_dir
        try:
            self.obey()
            yield
            self.obey()
        finally:
            self._saved = None

    @contextmanager
    def breaking_off(self, error: type[BaseException]) -> Iterator[None]:
        """Inside, this process works alone on what is begun anew when it is broken off: a stop signal raises `error`.

        Whoever catches it saves what there was before. It may come between any two bytecodes.
        """
        self._broken = error
        try:
            self._break_off()
            yield
            self._break_off()
        finally:
            self._broken = None

    def _break_off(self) -> None:
        if self._broken is not None and self._received:
            raise self._broken

    def obey(self) -> None:
        """Raise `Preempted` inside `at_once`, if a signal came: foreign code may have swallowed it there."""
        if self._saved is not None and self._received:
            raise Preempted(self._saved, number=self.received)

    def hand_on(self) -> None:
        """After everything is saved: call what handled the received signals before the run, if it was a function.

        A submitit job queues itself again here. Its handler ends rank 0 (SystemExit) or, when the job may not be
        queued again, raises an error with the reason; it returns on other ranks. Ctrl-C is nobody else's.
        """
        for number in self._received:
            handler = self._before.get(number)
            if callable(handler) and number != signal.SIGINT:
                handler(number, None)

    def uninstall(self) -> None:
        """Put back the handlers of before the run; what was received stays readable."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in self._received:
            self._received = (*self._received, number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a second one is not waited for
        self.obey()
        self._break_off()


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask this process to save and stop, as far as the platform has them.

    Raises ValueError when submitit's environment names a signal that does not exist.
    """
    names = ["SIGINT", "SIGTERM", "SIGUSR1"]
    if "SUBMITIT_EXECUTOR" in os.environ:  # this process is a submitit job; USR2 is its default
        names.append("SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
        if not hasattr(signal, names[-1]):
            raise ValueError(
                f"SUBMITIT_PREEMPT_SIGNAL={names[-1][3:]} is no signal of this platform; use USR2, or unset it"
            )
    found = (getattr(signal, name) for name in dict.fromkeys(names) if hasattr(signal, name))
    return tuple(found)


def _of_lightning(handler: Any) -> bool:
    """Whether Lightning installed a handler; functions, methods and objects all know their module."""
    return str(getattr(handler, "__module__", "")).split(".")[0] in _LIGHTNING

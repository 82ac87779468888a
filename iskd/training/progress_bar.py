"""Progress of a run: stage k of n, tokens, loss, time left. A live bar on a terminal, a line now and then elsewhere.

It goes to standard error: what a command finds can be piped. The bar stands while a stage trains and is gone in
between, where other progress is told; what is logged meanwhile stands above it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from iskd.report.terminal import terminal
from iskd.training.stages import StageLoop

_READ_EVERY = 1.0  # seconds


class StageProgress(ProgressBar):
    """Reads the run's position off the stage loop; owns nothing.

    Args:
        run: the loop that knows the stages. every: seconds between lines when there is no terminal.
    """

    def __init__(self, run: StageLoop, every: float = 15.0) -> None:
        super().__init__()
        self._run, self._every, self._last = run, every, 0.0
        self._started, self._first = time.monotonic(), 0
        self._console = terminal(sys.stderr)
        self._logs: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._on, self._loss = True, ""

    def disable(self) -> None:
        """Called by Lightning on ranks other than 0."""
        self._on = False

    def enable(self) -> None:
        """Called by Lightning on rank 0."""
        self._on = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from here."""
        self._started, self._first = time.monotonic(), self._run.count.in_run

    def _open(self) -> None:
        if self._bar is None and self._console.is_terminal:
            words = [TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[text]}")]
            columns = (words[0], BarColumn(), words[1], TimeRemainingColumn())
            both = sys.stdout.isatty()  # else what is printed is not for the terminal
            self._bar = Progress(*columns, console=self._console, transient=True, redirect_stdout=both)
            self._bar.start()
            self._lead_logs()
            self._task = self._bar.add_task("", total=self._run.state.total_steps, text="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """Move on."""
        if not self._on:
            return
        self._open()
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        state = self._run.state
        name = "" if state.stage is None else state.stage.name
        where = f"stage {len(state.finished) + 1}/{max(state.total_stages, len(state.finished) + 1)} {name}"
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            if now - self._last >= _READ_EVERY:  # to read a number waits for the device
                self._last, self._loss = now, f", loss {float(loss):.3f}"
            text = f"{state.tokens:,} tokens{self._loss}"
            self._bar.update(self._task, completed=self._run.count.in_run, description=where, text=text)
            if trainer.is_last_batch:  # what comes between two stages has progress of its own
                self.close()
        elif now - self._last >= self._every:
            self._last = now
            done, total = self._run.count.in_run, state.total_steps
            left = (now - self._started) / max(done - self._first, 1) * (total - done)
            text = f"step {done}/{total}, {state.tokens:,} tokens, loss {float(loss):.3f}, {left / 60:.0f} min left"
            self._console.print(f"{where}: {text}", soft_wrap=True)

    def _lead_logs(self) -> None:
        """Handlers of logs hold the streams of before, and would write into the bar; rich's own put lines above it."""
        named = (each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger))
        for handler in {handler for logger in (logging.root, *named) for handler in logger.handlers}:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stdout__, sys.__stderr__):
                instead = sys.stdout if handler.stream is sys.__stdout__ else sys.stderr
                if instead is not handler.stream:
                    self._logs.append((handler, handler.setStream(instead)))

    def close(self) -> None:
        """Take the bar away, and give logs back their streams."""
        for handler, stream in self._logs:
            handler.setStream(stream)
        self._logs = []
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error is readable."""
        self.close()

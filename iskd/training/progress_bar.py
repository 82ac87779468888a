"""Progress of a run: stage k of n, tokens, loss, time left. A live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

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
        self._console = terminal()
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
        """Open the bar."""
        self._started, self._first = time.monotonic(), self._run.count.in_run
        if self._on and self._console.is_terminal:
            words = [TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[text]}")]
            self._bar = Progress(words[0], BarColumn(), words[1], TimeRemainingColumn(), console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._run.state.total_steps, text="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """Move on."""
        if not self._on:
            return
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
        elif now - self._last >= self._every:
            self._last = now
            done, total = self._run.count.in_run, state.total_steps
            left = (now - self._started) / max(done - self._first, 1) * (total - done)
            text = f"step {done}/{total}, {state.tokens:,} tokens, loss {float(loss):.3f}, {left / 60:.0f} min left"
            self._console.print(f"{where}: {text}", soft_wrap=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error is readable."""
        self.on_train_end(trainer, pl_module)

"""The stage loop inside one `trainer.fit`: one Lightning epoch is one stage, and each hook is one call of the loop.

A resumed run enters with its position restored and with the data of what is left of its stage; nothing here depends on
Lightning's own loop counters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from iskd.system import Preempted, Ranks
from iskd.system.stop_signals import StopSignals
from iskd.system.text import argument
from iskd.system.watchdog import Watchdog
from iskd.training.editing import BrokenOffError
from iskd.training.live import AgreedStop, Live
from iskd.training.stages import StageLoop
from iskd.training.step import DistillModule
from iskd.training.strategies import ranks_of, rewrap, whole_device


class CompressionCallback(Callback):
    """Runs a stage loop inside a fit.

    Args:
        loop: the stages. resume_from: the checkpoint that its position comes from; None = the run starts.
        deadline: on the clock of `time.monotonic`, when to stop as on a stop signal; None = never.

    Attributes:
        planned: see `Live`.
    """

    planned = 0

    def __init__(self, loop: StageLoop, resume_from: Path | None = None, deadline: float | None = None) -> None:
        self.loop, self.resume_from, self.deadline = loop, resume_from, deadline
        self.ranks, self.stop_signals, self.watchdog = Ranks(), StopSignals(), Watchdog(Ranks(), "")

    @property
    def late(self) -> bool:
        """Whether the run's time is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def stop_wanted(self) -> bool:
        """Whether this process was asked to end the run."""
        return self.stop_signals.received is not None or self.late

    def _alone(self) -> AbstractContextManager[None]:
        """One process is broken off wherever it is; one of several would leave the others waiting."""
        alone = self.ranks.size == 1
        return self.stop_signals.breaking_off(BrokenOffError) if alone else nullcontext()

    def _breaking_off(self, *models: Any) -> AbstractContextManager[None]:
        """Several processes agree where they are broken off."""
        return self._alone() if self.ranks.size == 1 else self._agreed().inside(*models)

    def _look(self) -> None:
        if self.ranks.size > 1:
            self._agreed().look()

    def _agreed(self) -> AgreedStop:
        # a time limit breaks nothing off that would be begun anew, and again end within the limit of the next start
        return AgreedStop(self.ranks, lambda: self.stop_signals.received is not None, BrokenOffError)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The processes are there, and nothing is wrapped: make sure that they belong together."""
        self.ranks = ranks = ranks_of(trainer)
        loop, module = self.loop, cast(DistillModule, pl_module)
        module.join(ranks, self.stop_wanted)
        self.watchdog = Watchdog(ranks, f"Continue with {argument('resume', loop.run_dir)}")
        self.watchdog.start()
        found = None if self.resume_from is None else self.resume_from.name
        ranks.require_equal("newest whole checkpoint, teacher", [found, loop.state.tokens, loop.teacher])
        if self.resume_from is not None:
            device, context = whole_device(trainer.strategy), trainer.precision_plugin.forward_context
            alike = self._breaking_off if ranks.size > 1 else nullcontext
            try:
                with self._alone():
                    loop.editor.before_wrapping(loop.state, module, self.resume_from, device, context, alike)
            except BrokenOffError:  # everything is saved, and the next process begins with the same edit
                trainer.strategy.barrier("leave")  # the first process may not come back from handing the signal on
                self.watchdog.close()
                self.stop_signals.hand_on()
                raise Preempted(loop.run_dir, number=self.stop_signals.received) from None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the loop and enter its first stage."""
        live = Live(
            module=cast(DistillModule, pl_module),
            optimizer=trainer.optimizers[0],
            ranks=self.ranks,
            accumulate=trainer.accumulate_grad_batches,
            forward_context=trainer.precision_plugin.forward_context,
            rewrap=lambda: rewrap(trainer.strategy),
            loggers=trainer.loggers,
            precision=str(trainer.precision),
            stop_wanted=self.stop_wanted,
            breaking_off=self._breaking_off,
            alone=self._alone,
            look=self._look,
            planned=self.planned,
        )
        self.loop.begin(live, self.resume_from)
        trainer.should_stop = self.loop.advance() is None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The stage's edits are made; its training begins."""
        self.loop.before_training()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch is there."""
        self.loop.before_batch()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are there."""
        self.loop.before_step()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """A micro-batch is done."""
        self.loop.after_batch(batch)
        if self.loop.preempted:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the stage and enter the next one."""
        if self.loop.preempted:
            return
        self.loop.end(trained=True)
        if self.loop.advance() is None:
            trainer.should_stop = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say what helps."""
        self.loop.advise(exception)

    def close(self, *, failed: bool = False) -> None:
        """Put back what the run took: the connections to the other ranks and the signals."""
        self.watchdog.close(failed=failed)
        self.stop_signals.uninstall()

"""Whole runs on tiny models: their parts, schedules that do what a test says, and ways to break them off."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from iskd.data import TextData, TextFiles
from iskd.importance.block_influence import BlockInfluence
from iskd.losses.ce import CrossEntropy
from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.models.tokenizers import byte_tokenizer
from iskd.models.weights import model_tensors
from iskd.plan import Convert, Edit, Remove, Replace, Spec, Stage
from iskd.plan.options import RunOptions
from iskd.plan.run_files import METRICS_FILE
from iskd.schedules import History
from iskd.schedules.edits import ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.system.tables import read_csv
from iskd.teacher import Loaded
from iskd.training import Parts, Result, callback, editing, stages
from iskd.training.state import checkpoint, checkpoint_files
from iskd.training.step import module as step_module
from tests.factories import tiny

SLIM = Spec("iskd.blocks.slim.Slim", {"ratio": 0.5})
BOTTLENECK = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 3, "fit_steps": 4})
MIXER = Spec("iskd.mixers.linear_attention.LinearAttention", {})
TOKENS = 4 * 32  # of one optimizer step


class Crash(BaseException):
    """Stands for a kill: no handler of ours may catch it or write anything because of it."""


class Scripted:
    """The stages of a list, one after the other."""

    def __init__(self, stages: Sequence[Stage], *, restart_at_edit: bool = False, floor: float | None = None) -> None:
        self.stages, self.restart_at_edit, self.floor = stages, restart_at_edit, floor
        self.scoring = "never"
        self.trial_tokens, self.removes = 0, False

    def candidates_for(self, history: History) -> list[Stage]:
        done = len(history.stages)
        return [self.stages[done]] if done < len(self.stages) else []

    def complete(self, history: History) -> bool:
        return len(history.stages) == len(self.stages)


def every_edit(steps: int = 4) -> list[Stage]:
    """A compact block that is fitted, a removal, a mixer: one stage each, `steps` optimizer steps long."""
    edits: list[Edit] = [Replace(2, SLIM, seed=3), Remove(1), Convert(3, MIXER, seed=5), Replace(0, BOTTLENECK, seed=7)]
    return [
        Stage(f"{edit.op} {edit.layer}", (edit,), tokens=steps * TOKENS, lr=1e-3, lr_new=3e-3, fit=edit.op == "replace")
        for edit in edits
    ]


def write_text(folder: Path) -> Path:
    """A text file that a tiny model can learn something from."""
    lines = (f"Sentence number {n} says that {n} plus {n % 7} is {n + n % 7}. " * 12 for n in range(120))
    path = folder / "text.txt"
    path.write_text("\n\n".join(lines))
    return path


def make_parts(
    run_dir: Path,
    text: Path,
    cache: Path,
    *,
    schedule: Any = None,
    family: str = "llama",
    dropout: float = 0.1,
    batch_size: int = 2,
    accumulate: int = 2,
    options: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Parts:
    """A run of two replacements on a random model with four layers, seconds long."""
    model = tiny(family, vocab=257, dropout=dropout)
    assert model.generation_config is not None
    # a teacher's own settings, which every student must keep
    model.generation_config.do_sample, model.generation_config.top_k = True, 7
    tokenizer = byte_tokenizer()
    data = TextData(
        TextFiles(str(text)),
        tokenizer,
        cache_dir=cache,
        seq_len=32,
        batch_size=batch_size,
        val_tokens=512,
        validation_fraction=0.1,
        calibration_fraction=0.1,
    )
    run_dir.mkdir(exist_ok=True)
    default = Iterative(ReplaceWith(BOTTLENECK), layers=[2, 1], tokens=12 * TOKENS, lr=1e-3, lr_new=3e-3)
    settings = {"accelerator": "cpu", "precision": "32-true", "accumulate_grad_batches": accumulate, "progress": False}
    settings["log_every_n_steps"] = 1
    sizes: dict[str, Any] = {"checkpoint_every": 2, "fit_tokens": 128, "score_tokens": 128, "movement_steps": 3}
    sizes |= {"mfu": False, "efficiency_seconds": 0, "samples": 0}  # of the machine, not of the method
    parts = Parts(
        teacher=Loaded(model, tokenizer, {"name": family}),
        data=data,
        schedule=schedule or default,
        terms={"kl": (KL(), 1.0), "ce": (CrossEntropy(), 0.1), "hidden": (HiddenMatch("normalized"), 0.1)},
        run_dir=run_dir,
        importance=BlockInfluence(),
        options=RunOptions(**{**sizes, **(options or {})}),
        trainer={**settings, **(trainer or {})},
        chunk=64,
        export=False,
    )
    return replace(parts, **changes)


def weights(result: Result) -> dict[str, Tensor]:
    return model_tensors(result.student)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metric_rows(run_dir: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, without what a clock measured."""
    found, measured = read_csv(run_dir / METRICS_FILE), ("per_s", "share", "mfu")
    rows = [dict(zip(found.columns, cells, strict=True)) for cells in found.rows]
    return [{key: cell for key, cell in row.items() if cell and not key.endswith(measured)} for row in rows]


class At(Callback):
    """Calls something at the end of the n-th micro-batch that this process trains."""

    def __init__(self, batch: int, act: Callable[[Any], None]) -> None:
        self.left, self.act = batch, act

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        self.left -= 1
        if not self.left:
            self.act(pl_module)


def crash(_module: Any = None) -> None:
    raise Crash


def kill(_module: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


#: Functions inside which a run can be broken off: object and attribute by a short name.
PLACES: dict[str, tuple[Any, str]] = {
    "edit": (editing.surgery, "apply"),
    "fit": (editing, "warm_start"),
    "regroup": (step_module, "regroup"),
    "rewrap": (callback, "rewrap"),
    "save": (checkpoint, "save_file"),
    "rename": (checkpoint.os, "replace"),
    "prune": (checkpoint_files, "prune"),
    "validation": (stages, "measure_quality"),
    "step": (callback.DistillModule, "step"),
    "loader": (TextData, "train_dataloader"),
}


def interrupt(setattr_: Callable[[Any, str, Any], Any], place: str, call: int, act: Callable[[], None]) -> None:
    """Make the n-th call (from 0) of a place's function act first; later ones go through."""
    target, name = PLACES[place]
    original, calls = getattr(target, name), iter(range(1_000_000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            act()
        return original(*args, **kwargs)

    setattr_(target, name, wrapped)

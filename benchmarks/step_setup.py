"""What every way of `benchmarks.step` begins with and tells: models, batches, the settings of our run, a recorder."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.common import fast_bf16, peak_bytes
from iskd.commands import build
from iskd.models import surgery
from iskd.plan import Record, Remove
from iskd.system.machine import clock
from iskd.system.version import CONF
from iskd.training import Parts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LR = 1e-5


@dataclass(frozen=True)
class Task:
    """A teacher, the layers that its student lacks, the size of a batch, and whether bf16 is used where it is fast.

    `lr` is constant; `val_tokens` are the held-out ones.
    """

    overrides: tuple[str, ...]
    removed: tuple[int, ...]
    rows: int
    length: int
    bf16: bool = True
    lr: float = LR
    val_tokens: int = 512

    @property
    def mixed(self) -> bool:
        """Whether the ways run under bf16 autocast here."""
        return self.bf16 and fast_bf16(DEVICE)


TASKS = {
    "smollm2": Task(("model=smollm2", "data=docstrings"), (12, 13, 14, 15), rows=4, length=512),
    # random weights, to see that everything runs; bf16 would drown the little that its student differs by
    "tiny": Task(("model=tiny", "data=sample"), (1,), rows=2, length=64, bf16=False, val_tokens=64),
}


@dataclass
class Outcome:
    """What a way tells: per step seconds, tokens that are no padding, its own loss and the hash of its batch.

    `first_kl` is in nats per token, of the first batch and before any step, as the way itself computed it. `gaps` are
    seconds between the end of one step and the start of the next, `before` those of refits before the first step.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    first_kl: float = 0.0
    peak_bytes: int = 0
    before: float = 0.0


class Recorder:
    """Collects what a way does, tensors unread until the last step is over.

    Attributes:
        probe: called with the number of steps done and the student, before the first step and after each; its time
            does not count.
    """

    probe: ClassVar[Callable[[int, nn.Module], None] | None] = None

    def __init__(self) -> None:
        self.paused: list[float] = []
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.losses: list[Tensor] = []
        self.batches: list[Tensor] = []
        self.peak = 0

    def start(self, student: nn.Module) -> None:
        if Recorder.probe is not None and not self.starts:
            Recorder.probe(0, student)
        self.starts.append(clock(DEVICE))

    def end(self, student: nn.Module) -> None:
        self.ends.append(clock(DEVICE))
        self.peak = peak_bytes(DEVICE)
        if Recorder.probe is not None:
            Recorder.probe(len(self.ends), student)
        self.paused.append(clock(DEVICE) - self.ends[-1] if Recorder.probe is not None else 0.0)

    def outcome(self, tokens: list[int] | None = None, first_kl: float | None = None) -> Outcome:
        edges, paused = [self.starts[0], *self.ends], [0.0, *self.paused]
        losses = [float(loss) for loss in self.losses]
        return Outcome(
            seconds=[end - start - pause for (start, end), pause in zip(pairwise(edges), paused, strict=False)],
            tokens=[ids.numel() for ids in self.batches] if tokens is None else tokens,
            losses=losses,
            batches=[hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:12] for ids in self.batches],
            gaps=[a - b - c for a, b, c in zip(self.starts[1:], self.ends, self.paused, strict=False)],
            first_kl=losses[0] if first_kl is None else first_kl,
            peak_bytes=self.peak,
        )


@dataclass
class Setup:
    """Teacher and student on the device, the batches [steps, rows, length], and where more text comes from."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    record: Record
    ids_NBT: Tensor
    parts: Parts

    @property
    def steps(self) -> int:
        return len(self.ids_NBT)


@contextmanager
def configured(task: Task, steps: int, *options: str) -> Iterator[Parts]:
    """The objects of our run, with more options if given: the other ways take teacher and text from them."""
    tokens = steps * task.rows * task.length
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [
            *("schedule=oneshot", "edit=remove", f"schedule.layers={list(task.removed)}", "loss=[kl]"),
            *(f"schedule.count={len(task.removed)}", f"trainer.precision={'bf16-mixed' if task.mixed else '32-true'}"),
            *(f"data.batch_size={task.rows}", f"data.seq_len={task.length}", f"data.val_tokens={task.val_tokens}"),
            *(
                f"schedule.tokens={tokens}",
                f"schedule.lr={task.lr}",
                "+optim.betas=[0.9,0.999]",
                "optim.weight_decay=0.0",
            ),
            *("optim.warmup=0", "optim.decay=constant", "optim.clip=1.0", "trainer.progress=false", "export=false"),
            *("run.measure_before=false", "run.checkpoint_every=1000", "run.mfu=false", "run.efficiency_seconds=0"),
        ]
        yield build.parts(
            compose("config", [*task.overrides, *overrides, *options, "name=benchmark"]), Path(folder) / "run"
        )


@contextmanager
def prepared(task: Task, steps: int) -> Iterator[Setup]:
    """What loops and trainers other than ours begin with."""
    with configured(task, steps) as parts:
        teacher, data = parts.teacher.model, parts.data
        data.set_stage(0, steps)
        ids = torch.stack([batch["input_ids"] for batch in data.train_dataloader()])
        student, record = shortened(teacher, task)
        for model in (teacher.requires_grad_(False).eval(), student.requires_grad_(True).train()):
            model.config.use_cache = False
            nn.Module.to(model, DEVICE)
        yield Setup(teacher, student, record, ids, parts)


def shortened(teacher: PreTrainedModel, task: Task) -> tuple[PreTrainedModel, Record]:
    student = copy.deepcopy(teacher).float()
    whole = Record(int(teacher.config.num_hidden_layers))
    return student, surgery.apply(student, whole, [Remove(layer) for layer in task.removed])

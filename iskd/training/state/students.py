"""Students of stages, kept as model directories beside the run's last one (`run.keep_students`)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from iskd.export import STORED, export
from iskd.models import sharding, surgery, weights
from iskd.plan import Record
from iskd.plan.run_files import STUDENTS
from iskd.system import Busy, Ranks
from iskd.system.text import byte_unit
from iskd.teacher import Loaded
from iskd.training.state import checkpoint
from iskd.training.state.undisturbed import undisturbed
from iskd.training.step import DistillModule


def gathered(module: DistillModule, record: Record, ranks: Ranks) -> Any:
    """The student with whole weights: itself, or of one in shards a copy on rank 0's CPU. A collective."""
    if not sharding.is_sharded(module.student):
        return module.student
    tensors = checkpoint.held(weights.model_tensors(module.student), ranks)
    if ranks.rank:
        return module.student
    student = surgery.rebuild(module.teacher, record)
    weights.load_model_tensors(student, tensors)
    return student


def _bytes(number: float) -> str:
    unit, name = byte_unit(number)
    return f"{number / unit:.1f} {name}"


def stored_in(asked: str, teacher: Loaded) -> torch.dtype:
    """The type of exported weights: `auto` is that in which the teacher's were stored."""
    return STORED[str(teacher.source.get("stored", "float32")) if asked == "auto" else asked]


@dataclass(frozen=True)
class StudentKeeper:
    """Writes students of stages into RUN/students/NNN, NNN being the number of the stage.

    Attributes:
        run_dir: the run's.
        teacher: theirs.
        number: how many are kept, the newest; None = all.
        dtype: of their weights.
        code: beside those that plain transformers cannot load.
        max_shard_bytes: of one weights file.
    """

    run_dir: Path
    teacher: Loaded
    number: int | None
    dtype: torch.dtype
    code: str
    max_shard_bytes: int | str

    @property
    def root(self) -> Path:
        """Their folder."""
        return self.run_dir / STUDENTS

    def check(self, student: PreTrainedModel, stages: int) -> None:
        """Raise ValueError where the disk has no room for so many; one more than are kept is there for a moment."""
        count = stages if self.number is None else min(self.number + 1, stages)
        needed = count * surgery.parameters(student) * self.dtype.itemsize
        free = shutil.disk_usage(self.run_dir).free
        if needed > free:
            raise ValueError(
                f"run.keep_students: {count} students take about {_bytes(needed)}, and {self.run_dir} has room for "
                f"{_bytes(free)}: keep fewer (run.keep_students=N), or set hydra.run.dir to another disk"
            )

    def keep(self, module: DistillModule, record: Record, stage: int, ranks: Ranks) -> None:
        """Write the student as it is after a stage; on every rank alike, of which the first writes."""
        student = gathered(module, record, ranks)

        def write() -> None:
            if not ranks.rank:
                self._write(student, record, stage)

        checkpoint.together(ranks, self.run_dir, write)

    def _write(self, student: PreTrainedModel, record: Record, stage: int) -> None:
        self.root.mkdir(exist_ok=True)
        config, source = self.teacher.model.config, self.teacher.source
        with Busy(f"keeping the student of stage {stage}"), undisturbed(student):
            export(
                self.root / f"{stage:03d}", student, record, config, self.teacher.tokenizer,
                verify=False, teacher=source, max_shard_bytes=self.max_shard_bytes, dtype=self.dtype, code=self.code,
            )  # fmt: skip
        kept = sorted(path for path in self.root.iterdir() if path.name.isdecimal())
        for old in [] if self.number is None else kept[: -self.number]:
            shutil.rmtree(old)

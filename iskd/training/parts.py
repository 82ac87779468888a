"""What a run is made of and what it leaves: plain containers between `build`, `run` and `finish`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from iskd.data import TextData
from iskd.evaluation import EvalSpec
from iskd.losses import Chunk, Terms
from iskd.plan import Record, StageResult
from iskd.plan.options import RunOptions
from iskd.plan.trainer_settings import with_defaults
from iskd.refits import Refit
from iskd.schedules import Schedule
from iskd.schedules.mixed import parts_of
from iskd.teacher import Loaded, TeacherCacheSpec
from iskd.training.deciding import Importance
from iskd.training.step import OptimSpec


@dataclass
class Parts:
    """Everything a run is made of.

    `refits` are done to surviving blocks after every edit, in order. `trainer` holds keyword arguments of
    `lightning.Trainer`; those that are not given are as in `TrainerKeys`. `teacher_cache` says how the teacher's
    answers are kept on disk, `start` is the exported student that the run goes on from, None = the teacher,
    `evaluation` what the student is asked at the end, None = nothing; `export_dtype` is the
    type of the exported weights, `auto` that in which the teacher's were stored, `export_code` the code beside them;
    `tokens_told` is what the plan says of a number of tokens that nobody asked for.
    """

    teacher: Loaded
    data: TextData
    schedule: Schedule
    terms: Terms
    run_dir: Path
    importance: Importance | None = None
    refits: Sequence[Refit] = ()
    optim: OptimSpec = field(default_factory=OptimSpec)
    options: RunOptions = field(default_factory=RunOptions)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    loggers: list[Logger] = field(default_factory=list)
    callbacks: list[Callback] = field(default_factory=list)
    chunk: Chunk = "auto"
    seed: int = 0
    resume: bool = False
    export: bool = True
    export_dtype: str = "auto"
    export_code: str = "iskd"
    teacher_cache: TeacherCacheSpec | None = None
    evaluation: EvalSpec | None = None
    tokens_told: str = ""
    start: Path | None = None

    def __post_init__(self) -> None:
        self.trainer = with_defaults(self.trainer)

    @property
    def asked(self) -> EvalSpec | None:
        """What the student is asked at the end, if it is asked anything."""
        return self.evaluation if self.evaluation is not None and self.evaluation.asks else None

    @property
    def importances(self) -> list[Any]:
        """All that layers are chosen by: of several steps each its own."""
        own = (step.importance for step in parts_of(self.schedule))
        return [each for each in (self.importance, *own) if each is not None]


@dataclass(frozen=True)
class Result:
    """What a run leaves: its stage table, the student with its record, and where things are."""

    stages: list[StageResult]
    student: Any
    record: Record
    run_dir: Path
    model_dir: Path | None
    report: Path | None

    @property
    def final(self) -> StageResult:
        """The last stage that was kept."""
        return [stage for stage in self.stages if stage.status == "kept"][-1]

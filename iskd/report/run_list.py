"""Reading many runs: which folders are runs, how each one ended, and in which config keys they differ."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from iskd.evaluation import Interval
from iskd.evaluation.results import Measured
from iskd.plan import StageResult
from iskd.plan.options import UPKEEP
from iskd.plan.results import rolled_back_of, student_of, teacher_of
from iskd.plan.run_files import CONFIG_FILE, FAILURE_FILE, MODEL, STAGES_FILE, work_in
from iskd.plan.saved_config import read_config
from iskd.report.read_run import RunFiles, read_run

_GO_ON = "(resume= goes on)"
_SEARCHED_DEPTH = 4  # runs/<experiment>/<sweep>/<job>
_MOST_KEYS = 5_000
_MOST_LEVELS = 32
# What tells two runs of one configuration apart, and where they are kept, says nothing about the method.
_INCIDENTAL = frozenset({"resume", "cache_dir", "objectives", "plan_only", "trainer.progress"}) | {
    f"run.{key}" for key in (*UPKEEP, "measure_before", "movement_steps")
}
_INCIDENTAL_GROUPS = ("logger", "export")
# of an evaluation's settings: which items of its tasks were drawn, and what stood before them
_DRAWN_BY = ("seed", "limit", "data", "items", "excluded", "fewshot")


@dataclass(frozen=True)
class Run:
    """One run among others.

    Attributes:
        name: Its folder, below what all runs share.
        folder: Where it is.
        files: What it left.
        config: The resolved config as dotted key -> text; empty where it cannot be read.
    """

    name: str
    folder: Path
    files: RunFiles
    config: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def teacher(self) -> StageResult | None:
        """The teacher's row."""
        return teacher_of(self.files.stages)

    @cached_property
    def student(self) -> StageResult | None:
        """The student as the run left it; None when no stage was kept, or none but the teacher's row was reached."""
        student = student_of(self.files.stages)
        return None if student is self.teacher and len(self.files.stages) < 2 else student

    @property
    def finished(self) -> bool:
        """Whether the stages came to their end: the record is the last thing that is written about them."""
        return self.files.record is not None and self.student is not None

    @property
    def exported(self) -> bool:
        """Whether the student lies where the run was to write it; True for a run without an export."""
        asked = any(key.split(".")[0] == "export" and value != "false" for key, value in self.config.items())
        return not asked or (self.folder / MODEL).is_dir()

    @property
    def undone(self) -> list[StageResult]:
        """The stages whose edits were rolled back."""
        return rolled_back_of(self.files.stages)

    @property
    def marks(self) -> list[str]:
        """What went wrong, in words; empty for a run that finished with all its edits, and is exported if it was to."""
        failed = [] if self.files.failure is None else [f"failed: {self.files.failure:.200}"]
        if self.student is None and work_in(self.folder):
            return [*failed, f"stopped before the end of its first stage {_GO_ON}"]
        if self.student is None:
            planned = self.config.get("plan_only") == "true" and not failed
            return [*failed, "planned only" if planned else "no stage finished"]
        marks = failed + ([] if self.finished else [f"stopped after stage {self.files.stages[-1].index} {_GO_ON}"])
        if self.finished and not self.exported:
            marks.append(f"not exported {_GO_ON}")
        if self.undone:
            marks.append(f"{len(self.undone)} rolled back")
        if self.student is self.teacher:
            marks.append("no edit kept")
        if not all(map(math.isfinite, (self.student.ppl, self.student.retention))):
            marks.append("diverged")
        elif self.student.guesses:
            marks.append("no better than guessing")
        return marks

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run, rolled-back stages included."""
        return max((stage.tokens for stage in self.files.stages), default=0)

    @property
    def seconds(self) -> float:
        """Wall time of the stages."""
        return sum(stage.seconds for stage in self.files.stages if math.isfinite(stage.seconds))

    @property
    def task_retention(self) -> Interval:
        """Mean retention over tasks from evaluation.json; NaN without one."""
        unknown = Interval(math.nan, math.nan, math.nan)
        return unknown if self.files.evaluation is None else self.files.evaluation.mean

    @property
    def asked(self) -> str:
        """What the run was evaluated on, as text that is equal where two runs were asked the same items; "" = nothing.

        Other items, drawn by another seed or limit or from other files, give another retention for the same student.
        """
        evaluation = self.files.evaluation
        if evaluation is None:
            return ""
        drawn = {key: evaluation.settings.get(key) for key in _DRAWN_BY}
        tasks = sorted([task.task, task.metric, str(task.items)] for task in evaluation.tasks)
        return json.dumps([tasks, drawn], sort_keys=True, default=str)

    @property
    def measured(self) -> Measured | None:
        """The student's measured size and speed."""
        return None if self.files.efficiency is None else self.files.efficiency.student

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """The config without seeds and what is incidental: equal for repetitions of one configuration."""
        return tuple((key, value) for key, value in sorted(self.config.items()) if not _incidental(key))


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: it has stages or, where these were not reached, a config or what ended it."""
    return any((folder / name).is_file() for name in (STAGES_FILE, CONFIG_FILE, FAILURE_FILE))


def find_runs(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Folders of runs in natural order, each once, and what was given but is none.

    A folder that is no run stands for the runs within it (a sweep's jobs, or all of runs/).
    """
    found: dict[Path, Path] = {}  # by the resolved path: a run given twice, or by a link too, counts once
    problems = []
    for folder in folders:
        runs = list(_within(folder, _SEARCHED_DEPTH)) if folder.is_dir() else []
        if not runs:
            what = f"no {STAGES_FILE} and no {CONFIG_FILE}, in it or in the folders within it"
            problems.append(f"{folder}: {what if folder.is_dir() else 'not a folder'}")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return sorted(found.values(), key=lambda run: _natural(str(run))), problems


def _within(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth:
        # A link may lead back up; a run that is linked to can be given by itself.
        inner = (each for each in folder.iterdir() if each.is_dir() and not each.is_symlink() and each.name[0] != ".")
        for each in sorted(inner):
            yield from _within(each, depth - 1)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts run-2 before run-10."""
    return [(int(piece) if piece.isdecimal() and len(piece) < 18 else -1, piece) for piece in re.split(r"(\d+)", text)]


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Every run in or within `folders`, and what could not be read, with the reason.

    Raises:
        ValueError: None of the folders is or holds a run.
    """
    paths, problems = find_runs(folders)
    if not paths:
        given = ", ".join(map(str, folders)) or "no folder at all"
        raise ValueError(
            f"no run in {given}: looked for {STAGES_FILE} or {CONFIG_FILE} in each folder and {_SEARCHED_DEPTH} levels "
            "below it; pass the folders that training wrote, for example runs/*"
        )
    # names are what is left below the deepest folder that holds all runs
    above = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    runs = []
    for path in paths:
        name = path.resolve().relative_to(above).as_posix()
        try:
            files = read_run(path, curves=False)
            config, notes = _read_config(path)
        except (OSError, ValueError) as error:
            # one unreadable run is told on the page and does not cost the others
            problems.append(f"{name}: {str(error).replace(f'{path}{os.sep}', '')}")
        else:
            runs.append(Run(name, path, files, config))
            problems += [f"{name}: {told}" for told in (*notes, *files.faults)]
    return runs, problems


def _read_config(folder: Path) -> tuple[dict[str, str], list[str]]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}, [f"{CONFIG_FILE} is missing: its settings are not known"]
    try:
        return dict(_limited(flatten(read_config(path)))), []
    except ValueError as error:
        said = " ".join(str(error).replace(str(path), CONFIG_FILE).split())[:400]
        return {}, [said if said.startswith(CONFIG_FILE) else f"{CONFIG_FILE} cannot be read: {said}"]


def _limited(items: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for count, item in enumerate(items):
        if count == _MOST_KEYS:
            raise ValueError(f"more than {_MOST_KEYS} keys: not a config that a run saved")
        yield item


def flatten(value: Any, key: str = "", level: int = 0) -> Iterator[tuple[str, str]]:
    """A config as dotted keys and texts; a list of plain values is one value.

    Raises:
        ValueError: The config is nested too deeply.
    """
    if level > _MOST_LEVELS:
        raise ValueError(f"nested deeper than {_MOST_LEVELS} levels: not a config that a run saved")
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flatten(item, f"{key}.{name}" if key else str(name), level + 1)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for i, item in enumerate(value):
            yield from flatten(item, f"{key}.{i}", level + 1)
    elif key:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)


def _incidental(key: str) -> bool:
    names = key.split(".")
    return key in _INCIDENTAL or names[0] in _INCIDENTAL_GROUPS or names[-1] == "seed"


def differing(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys whose value is not the same in all configs (a missing key is a value too), in order of appearance."""
    keys = dict.fromkeys(key for config in configs for key in config)  # a set that keeps the order
    return [key for key in keys if key != "resume" and len({config.get(key) for config in configs}) > 1]


def telling(configs: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """Of the differing keys those that tell runs apart.

    Where two runs use different parts (`x._target_` differs), the part says it all: keys of `x` that some runs lack and
    that are the same in all others come and go with it.
    """
    # "block._target_" differs: "block." is the prefix of all keys that belong to the one part or the other
    parts = tuple(key.removesuffix("_target_") for key in keys if key.endswith("._target_"))

    def comes_with_its_part(key: str) -> bool:
        # a key that some runs lack differs by that alone; two values among those that have it are a setting of its own
        values = {config[key] for config in configs if key in config}
        return not key.endswith("._target_") and key.startswith(parts) and len(values) == 1

    return [key for key in keys if not comes_with_its_part(key)]

"""The files of a run's folder: one list of their names, and the writer of the record, which exports have too."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iskd.plan.edits import Record
from iskd.plan.reading import to_json
from iskd.system import write_whole
from iskd.system.files import leads_out, read_object

CONFIG_FILE = "config.yaml"
"""What the run was started with; there as soon as all its parts are made, and replaced until there is work of it."""
ENVIRONMENT_FILE = "environment.json"
"""Teacher, machine and versions, from the start."""
DATA_FILE = "data.json"
"""What identifies the data, and what layers were selected by."""
PLAN_FILE = "plan.json"
"""All stages that are to come, before the first one."""
ENDED = "ended_after"
"""Key of the plan's last row, written at the end of the run: seconds that the end took."""
BUDGET_FILE = "budget.json"
"""What becomes of every layer within the run's budget (`iskd.schedules.budget`), found before the plan."""
METRICS_FILE = "metrics.csv"
"""One row per logged step."""
KEPT_METRICS_FILE = "metrics.kept.csv"
"""Rows of before beside those of `METRICS_FILE`, where an earlier version was killed in a resumed run."""
STAGES_FILE = "stages.json"
"""One result per stage, from the first one on: what makes a folder that of a run."""
RECORD_FILE = "record.json"
"""All edits of the student: of a run, whether it came to its end; beside an exported student too."""
FACTS = "export.json"
"""Beside an exported student: what it said when it was made, its hashes, its teacher."""
EVALUATION_FILE = "evaluation.json"
"""The student's scores beside the teacher's."""
EFFICIENCY_FILE = "efficiency.json"
"""What student and teacher cost."""
SAMPLES_FILE = "samples.json"
"""What teacher and student make of the same prompts."""
PROFILE_FILE = "profile.json"
"""Where the time of an optimizer step goes."""
STAGES_TABLE_FILE = "stages.csv"
"""The stages as a table, beside the page."""
LENGTHS_TABLE_FILE = "lengths.csv"
"""Recall by length and loss by position as a table, beside the page."""
RUNS_TABLE_FILE = "compared.csv"
"""The table of the page about several runs."""
RUNS_LENGTHS_FILE = "compared_lengths.csv"
"""Recall and loss by length of several runs."""
REPORT_FILE = "report.html"
"""The page about a run."""
RUNS_FILE = "runs.html"
"""The page about several runs, in the folder above them."""
PICTURE_FILE = "run.png"
"""A run in one picture."""
TRACKING_FILE = "tracking.json"
"""The W&B run that a run is, also after a resume."""
FAILURE_FILE = "failure.json"
"""What ended a run that failed; gone when it is started again."""
LOCK_FILE = "run.lock"
"""Locked by the process that runs here, and who that is."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints."""
MODEL = "model"
"""Folder of the exported student."""
STUDENTS = "students"
"""Folder of the students of stages, where they are kept."""


HYDRA = ".hydra"
"""Folder of what Hydra notes of a run."""


def work_in(run_dir: Path) -> list[str]:
    """What a run has come to that starting anew would overwrite, by name; empty where there is no more than settings.

    Checkpoints count as they are, torn ones too.
    """
    there = [name for name in (STAGES_FILE, RECORD_FILE, MODEL) if (run_dir / name).exists()]
    return [*there, *(path.name for path in sorted((run_dir / CHECKPOINTS).glob("[0-9]*-*")))]


def refuse_strange(run_dir: Path) -> None:
    """Look at a folder before it is written to: links in it that lead out of it would have others written to.

    Whoever opens a pipe waits for its other end, and what goes into a device or a socket is no file of the run.

    Nobody writes into what lies in hidden folders, Hydra's apart: those are not looked into. Files below `wandb/` may
    be such links: W&B puts one to its own log there, and replaces them all.

    Raises:
        ValueError: at any depth something is such a link, or neither a plain file nor a folder.
    """
    for place, folders, names in os.walk(run_dir):  # which follows no link
        folder = Path(place)
        wandbs = "wandb" in folder.relative_to(run_dir).parts
        inner = sorted(folders)
        folders[:] = [name for name in folders if name[0] != "." or name == HYDRA]
        for path in (folder / name for name in (*inner, *sorted(names))):
            if path.is_symlink() and not (wandbs and path.name in names) and leads_out(path, run_dir):
                raise ValueError(
                    f"{path} is a link out of the folder of the run: put the file or folder itself there, or have the "
                    "folder of the run lie elsewhere as a whole"
                )
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is a pipe, a socket or a device, which no run leaves behind: remove it")


def run_of(student: Path | None) -> Path | None:
    """The folder of the run whose last student lies in this folder, or one that it kept of a stage; None = of none."""
    if student is None:
        return None
    kept = student.parent.name == STUDENTS
    above = (student, student.parent, *([student.parent.parent] if kept else []))
    return next((folder for folder in above if (folder / STAGES_FILE).is_file()), None)


def selected_in(run: Path | None) -> dict[str, list[str]]:
    """Hashes of the items of tasks that a run chose layers by, by task, as it wrote them down; {} without a run.

    Raises ValueError where its file holds something else.
    """
    chosen = {} if run is None else read_object(run / DATA_FILE).get("selection_sha256", {})
    lists: list[Any] = list(chosen.values()) if isinstance(chosen, dict) else [None]
    if not all(isinstance(items, list) and all(isinstance(item, str) for item in items) for items in lists):
        raise ValueError(f"{run}/{DATA_FILE}: selection_sha256 must be an object of lists of hashes: restore the file")
    return dict(chosen)


@dataclass(frozen=True)
class LearnedText:
    """What a run trained and calibrated on.

    Attributes:
        content: identifies its source: of local files their hash, before those of validation.
        cache: name of the folder of its token shards; "" where the run did not say.
    """

    content: str
    cache: str


def learned_in(run: Path | None) -> list[LearnedText]:
    """The text of a run behind those of the runs that its student comes from, as it wrote them down; [] without a run.

    Raises ValueError where its file holds something else.
    """
    if run is None:
        return []
    told = read_object(run / DATA_FILE)
    before, found = told.get("before", []), list[LearnedText]()
    for text in [*before, told] if isinstance(before, list) else [None]:
        values: list[Any] = [text.get("content", ""), text.get("cache", "")] if isinstance(text, dict) else [None]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(
                f"{run}/{DATA_FILE}: content and cache must be strings, before a list of such objects: restore the file"
            )
        found.append(LearnedText(*values))
    return found


def write_record(folder: Path, record: Record) -> Path:
    """Write the record of edits into the folder of a run or of an exported student."""
    return write_whole(folder / RECORD_FILE, json.dumps(to_json(record), indent=1))

"""`iskd evaluate` and `iskd profile`: config -> what they ask -> their results."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from iskd import build
from iskd.evaluate import evaluate
from iskd.evaluation import Evaluation
from iskd.finish import EVALUATION
from iskd.generate import find_teacher
from iskd.loading import load
from iskd.plan import read_json
from iskd.profile_report import Profile
from iskd.profiling import profile_parts
from iskd.progress_line import ProgressLine
from iskd.teachers import Loaded, load_teacher
from iskd.tracking import STAGES_FILE
from iskd.verify import student_folder, tokenizer_of


def evaluation(config: DictConfig, folder: Path) -> tuple[Evaluation, list[Path]]:
    """Evaluate `model` beside `reference`, or beside the teacher that a student was made from.

    Args:
        config: the composed config; `model.path` may be a run, an export or any model's folder.
        folder: where the result goes; it also goes into the run that the student belongs to, for its report.

    Returns:
        The result, and the files it was written to.

    Raises:
        ValueError: nothing to load, tokenizers that differ, or as `iskd.evaluate.evaluate`.
    """
    spec, student = build.part(config.eval), _student(config)
    run = None if student is None else next((d for d in (student, student.parent) if (d / STAGES_FILE).is_file()), None)
    teacher = _teacher(config, student)
    if student is None:
        model = load_teacher(build.part(config.model))
    else:
        tokenizer = tokenizer_of(student) or (None if teacher is None else teacher.tokenizer)
        if tokenizer is None:
            raise ValueError(f"{student} has no tokenizer: put that of its teacher beside it, or set reference=TEACHER")
        model = Loaded(load(student), tokenizer, {})
    accelerator = config.trainer.get("accelerator", "cpu")
    device = torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    for each in filter(None, (model, teacher)):
        nn.Module.to(each.model.eval(), device)
    low = build.precision(config.trainer.get("precision", "auto"), accelerator) == "bf16-mixed"
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        found = evaluate(model.model, model.tokenizer, spec, teacher, exclude=_chosen_by(run))
    files = [place / EVALUATION for place in (folder, run) if place is not None]
    for file in files:
        file.write_text(found.to_json(), encoding="utf-8")
    return found, files


def _student(config: DictConfig) -> Path | None:
    """The folder of the student that `model` names; None for any other model."""
    if config.model.path is None:
        return None
    folder = Path(config.model.path).expanduser()
    if not (folder / STAGES_FILE).is_file() and not (folder / "export.json").is_file():
        return None
    return student_folder(folder)


def _teacher(config: DictConfig, student: Path | None) -> Loaded | None:
    """What the model is compared with: `reference`, else a student's own teacher, else nothing."""
    if config.reference is None and student is None:
        return None
    return load_teacher(find_teacher(student, config.reference))


def _chosen_by(run: Path | None) -> list[str]:
    """Hashes of the items that the run chose layers by."""
    if run is None or not (run / "data.json").is_file():
        return []
    selected = read_json(run / "data.json").get("selection_sha256", {})
    return [sha for items in selected.values() for sha in items]


def profile(config: DictConfig, folder: Path) -> Profile:
    """Profile a step of the first stage that trains; `profile.steps`, `profile.edits` and `profile.operators`."""
    with ProgressLine() as line:
        return profile_parts(build.parts(config, folder), **build.plain(config.profile), progress=line)

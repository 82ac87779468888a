"""The teacher of a config, and the student that a run goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from iskd.commands.values import object_of
from iskd.models.weights import present_weights
from iskd.plan.run_files import FACTS
from iskd.system.files import expanded
from iskd.teacher import Loaded, TeacherSpec, load_teacher
from iskd.teacher.origin import find_teacher


def teacher_of(config: DictConfig, within: Sequence[Path] = ()) -> tuple[Loaded, Path | None]:
    """The teacher of a config, and where `model` names a student, that one's own teacher and its folder.

    Args:
        config: whose values are as meant.
        within: weights that bound a teacher made of what the config describes.

    Raises:
        ValueError: as `load_teacher` and `find_teacher`.
    """
    described: TeacherSpec = object_of(config.model)
    start = student_of(described, config.get("reference"))
    if start is None:
        return load_teacher(described, within), None
    found = find_teacher(start, config.get("reference"))
    return load_teacher(found, within or present_weights(start)), start


def student_of(model: TeacherSpec, reference: str | None) -> Path | None:
    """The folder of a student that `model` names, to go on from beside its own teacher; None for any other model.

    `reference` names another teacher; where it is the student itself, that one is taken for the teacher.

    Raises:
        ValueError: `reference` is another model, and `model` no student: it is its own teacher.
    """
    folder = None if model.path is None else Path(expanded(model.path))
    if folder is not None and reference is not None and Path(expanded(reference)).resolve() == folder.resolve():
        return None
    if folder is not None and (folder / FACTS).is_file():
        return folder
    if reference is not None:
        raise ValueError(
            f"reference={reference} names the teacher of a student that a run goes on from, and {model.name} is none "
            f"(a student has {FACTS} beside its weights): leave reference= out; to compare two models: iskd evaluate"
        )
    return None

"""The teacher that an exported student or a run came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from iskd.models.model_folder import refuse_missing_folder
from iskd.plan.run_files import CONFIG_FILE, FACTS, STUDENTS
from iskd.plan.saved_config import read_config
from iskd.system.faults import UnavailableError
from iskd.system.files import expanded, read_object
from iskd.system.version import CONF, options
from iskd.teacher.bundled import BUNDLES
from iskd.teacher.load import TeacherSpec

_NAME_IT = "name it: --teacher DIR_OR_NAME (iskd generate), reference=DIR_OR_NAME (iskd evaluate)"


def find_teacher(folder: Path | None, teacher: str | Path | None = None) -> TeacherSpec:
    """Which teacher to load for the student in `folder`.

    It is `teacher` where given (a folder, a bundled key or a name on the hub), else that of the run whose directory
    holds the export (its config.yaml), else what the export says, if that can be had from elsewhere.

    Raises:
        ValueError: nothing says it.
    """
    found = _named_or_of(folder, teacher)
    seen = {folder.resolve()} if folder is not None else set()
    # a run on the student of another one has that one's teacher
    while found.path is not None and (Path(expanded(found.path)) / FACTS).is_file() and teacher is None:
        before = Path(expanded(found.path)).resolve()
        if before in seen:
            raise ValueError(f"{before} is said to be its own teacher; {_NAME_IT}")
        seen.add(before)
        found = _named_or_of(before, None)
    return found


def _named_or_of(folder: Path | None, teacher: str | Path | None) -> TeacherSpec:
    if teacher is not None:
        if Path(expanded(teacher)).is_dir():
            return TeacherSpec(Path(teacher).name, path=str(teacher))
        refuse_missing_folder("the teacher", str(teacher))
        return _named(str(teacher))
    if folder is not None:
        above = folder.resolve().parent
        for saved in (above / CONFIG_FILE, *([above.parent / CONFIG_FILE] if above.name == STUDENTS else [])):
            if saved.is_file():
                return _of_run(saved)
        source = read_object(folder / FACTS, links=True).get("teacher")
        if (
            isinstance(source, dict)
            and source.get("kind") in ("hub", "bundled")
            and isinstance(source.get("name"), str)
        ):
            return dataclasses.replace(_named(source["name"]), revision=source.get("revision"))
    raise ValueError(f"which teacher? nothing here says where it is; {_NAME_IT}")


def _named(name: str) -> TeacherSpec:
    """A teacher by a preset of conf/model, its bundled key, or its name on the hub, which a bundle may stand in for."""
    if name in options("model"):
        told = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8")).get("name")
        name = told if isinstance(told, str) and "/" in told else name  # local, hub and tiny name no published model
    key = next((key for key, found in BUNDLES.items() if name.rpartition("/")[2].lower() in (key, found.folder)), None)
    return TeacherSpec(name, bundled=key)


def _of_run(file: Path) -> TeacherSpec:
    """The teacher of a run's config. No code comes with it: every known family is in transformers."""
    try:
        config = read_config(file)
        values = {key: value for key, value in config["model"].items() if key[:1] != "_"}
        spec = TeacherSpec(**values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not say which teacher it was ({error!s:.200}); {_NAME_IT}") from error
    if spec.path is not None and not Path(expanded(spec.path)).is_dir():
        raise UnavailableError(
            f"the teacher of this student was {spec.path!r}, as {file} says, and that is no folder here (a model given "
            f"to iskd.compress was in memory); {_NAME_IT}"
        )
    return dataclasses.replace(spec, trust_remote_code=False, dtype="float32")

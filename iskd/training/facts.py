"""What identifies data, teacher and machine of a run."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
import transformers

from iskd.plan.run_files import DATA_FILE, ENVIRONMENT_FILE, learned_in, run_of, selected_in
from iskd.system import Json, write_whole
from iskd.system.files import read_object
from iskd.system.machine import host_kind
from iskd.system.version import __version__, command_line, commit
from iskd.training.parts import Parts

_MOST = 50  # starts of a run that are listed


def write_facts(parts: Parts, trainer: L.Trainer) -> None:
    """What identifies data, teacher and machine, beside the results, and the commands that started the run so far."""
    facts = {
        "teacher": parts.teacher.source,
        "commands": _commands(parts),
        "commit": commit(),
        "versions": {
            "iskd": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lightning": L.__version__,
            "cuda": torch.version.cuda,
        },
        "host": host_kind(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
    }
    write_whole(parts.run_dir / ENVIRONMENT_FILE, json.dumps(facts, indent=1))
    write_data(parts)


def _commands(parts: Parts) -> list[str]:
    """The command lines of the run, those of its earlier sessions first."""
    file = parts.run_dir / ENVIRONMENT_FILE
    before: Json = {}
    if parts.resume:
        with suppress(OSError, ValueError):  # it is replaced anyway
            before = read_object(file)
    known = before.get("commands")
    listed = [each for each in known if isinstance(each, str)] if isinstance(known, list) else []
    return [*listed, command_line() or "iskd.compress, from Python"][-_MOST:]


def write_data(parts: Parts) -> None:
    """What identifies the data, what the student has learned from in earlier runs, and what layers were selected by."""
    before = [asdict(text) for text in learned_in(run_of(parts.start))]
    chosen = selected(*parts.importances, start=parts.start)
    data = {**parts.data.manifest(), **({"before": before} if before else {}), "selection_sha256": chosen}
    write_whole(parts.run_dir / DATA_FILE, json.dumps(data, indent=1))


def selected(*importances: object, start: Path | None = None) -> dict[str, list[str]]:
    """Hashes of the items of tasks that layers are chosen by, by task; {} where they are chosen by something else.

    Args:
        importances: of the run.
        start: the student that it goes on from, whose layers were chosen before.
    """
    found = {task: dict.fromkeys(hashes) for task, hashes in selected_in(run_of(start)).items()}
    for importance in importances:
        for task, items in getattr(importance, "selection", {}).items():
            found.setdefault(task, {}).update(dict.fromkeys(item.sha256 for item in items))
    return {task: list(hashes) for task, hashes in found.items()}

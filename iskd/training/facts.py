"""What identifies data, teacher and machine of a run."""

from __future__ import annotations

import json
import os
import platform

import lightning as L
import torch

from iskd.plan.run_files import DATA_FILE, ENVIRONMENT_FILE
from iskd.system import write_whole
from iskd.training.parts import Parts


def write_facts(parts: Parts, trainer: L.Trainer) -> None:
    """What identifies data, teacher and machine, beside the results."""
    facts = {
        "teacher": parts.teacher.source,
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


def write_data(parts: Parts) -> None:
    """What identifies the data, and what layers were selected by."""
    data = {**parts.data.manifest(), "selection_sha256": selected(parts.importance)}
    write_whole(parts.run_dir / DATA_FILE, json.dumps(data, indent=1))


def selected(importance: object) -> dict[str, list[str]]:
    """Hashes of the items of tasks that layers are chosen by, by task; {} where they are chosen by something else."""
    selection = getattr(importance, "selection", {})
    return {task: [item.sha256 for item in items] for task, items in selection.items()}

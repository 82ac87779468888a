"""Checkpoints of a run: safetensors and JSON, written whole or not at all. No pickle is written or read.

    checkpoints/000012-boundary/  student.safetensors optimizer.safetensors rng.safetensors state.json manifest.json

The number counts the checkpoints of a run; a `boundary` lies between two stages, a `stage` inside one.
A checkpoint is written beside its place and moved there by one rename; `manifest.json` holds the size and SHA-256 of
every file, so that a torn one is recognised and the one before it is used.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iskd.model_files import file_sha256
from iskd.optim import load_optimizer_tensors, optimizer_tensors
from iskd.state import RunState

_log = logging.getLogger(__name__)
STAGE, BOUNDARY = "stage", "boundary"
_FILES = ("student.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name, tied ones once, contiguous: what safetensors takes."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: value.detach().contiguous() for name, value in model.state_dict().items() if name in names}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into `model`; every parameter and persistent buffer must be there with its shape.

    Raises ValueError naming the first tensor that is missing, unknown or of another shape.
    """
    own = model_tensors(model)
    problems = [f"{n!r} is missing" for n in own if n not in tensors] + [
        f"{n!r} is unknown" for n in tensors if n not in own
    ]
    problems += [
        f"{n!r} has shape {list(tensors[n].shape)} instead of {list(own[n].shape)}"
        for n in own
        if n in tensors and tensors[n].shape != own[n].shape
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit the student that the record describes: {problems[0]} ({len(problems)} such)"
        )
    with torch.no_grad():
        state = model.state_dict()
        for name, value in tensors.items():
            state[name].copy_(value)


def rng_tensors() -> dict[str, Tensor]:
    """State of this process's random number generators."""
    numpy_state: Any = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.from_numpy(np.append(numpy_state[1].astype(np.int64), numpy_state[2])),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng(states: Mapping[str, Tensor]) -> None:
    """Inverse of `rng_tensors`."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    values = states["numpy"].numpy()
    np.random.set_state(("MT19937", values[:-1].astype(np.uint32), int(values[-1]), 0, 0.0))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save(
    root: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: RunState, rng: list[dict[str, Tensor]]
) -> Path:
    """Write one checkpoint below `root` and return its folder. `rng` holds one entry per rank.

    Raises OSError with the path, the reason and what is intact when the disk is full or not writable.
    """
    target = root / f"{1 + max(map(_order, _folders(root)), default=0):06d}-{STAGE if state.edited else BOUNDARY}"
    draft = root / f".draft-{target.name}-{os.getpid()}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file(model_tensors(student), draft / _FILES[0])
        save_file(optimizer_tensors(optimizer, student), draft / _FILES[1])
        save_file(
            {f"{key}/{rank}": value for rank, states in enumerate(rng) for key, value in states.items()},
            draft / _FILES[2],
        )
        (draft / _FILES[3]).write_text(json.dumps(state.to_json(), indent=1))
        manifest = {
            name: {"bytes": (draft / name).stat().st_size, "sha256": file_sha256(draft / name)} for name in _FILES
        }
        (draft / "manifest.json").write_text(json.dumps({"files": manifest}, indent=1))
        _sync(draft)
        os.replace(draft, target)
        _sync_folder(root)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not isinstance(error, OSError) and not full:
            raise
        reason = "the disk is full" if full else str(error)
        raise OSError(
            f"could not write the checkpoint {target}: {reason}. Earlier checkpoints are intact: free some space "
            f"and continue with resume={root.parent}"
        ) from error
    return target


def _order(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _folders(root: Path) -> list[Path]:
    found = [path for kind in (STAGE, BOUNDARY) for path in root.glob(f"[0-9]*-{kind}") if path.is_dir()]
    return sorted(found, key=_order)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _right_sizes(path: Path) -> bool:
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        return all((path / name).stat().st_size == files[name]["bytes"] for name in _FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when every file has the size and digest of its manifest."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        for name in _FILES:
            if (path / name).stat().st_size != files[name]["bytes"]:
                return f"{name} has the wrong size"
            if file_sha256(path / name) != files[name]["sha256"]:
                return f"{name} was changed after it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is not complete ({error})"
    return None


def newest(root: Path, kind: str = "") -> Path | None:
    """The newest whole checkpoint below `root` (of one `kind`), or None; torn ones are skipped with a warning."""
    for path in reversed(_folders(root)):
        if not path.name.endswith(kind):
            continue
        trouble = problem(path)
        if trouble is None:
            return path
        _log.warning("checkpoint %s is skipped: %s; using the one before it", path, trouble)
    return None


def read_state(path: Path) -> RunState:
    """Position of the run at a checkpoint."""
    return RunState.from_json(json.loads((path / "state.json").read_text()))


def restore(
    path: Path, student: nn.Module, optimizer: torch.optim.Optimizer | None, rank: int = 0, *, rng: bool = True
) -> None:
    """Load weights, optimizer state and random numbers of a checkpoint into objects of the right structure."""
    load_model_tensors(student, load_file(path / _FILES[0]))
    if optimizer is not None:
        load_optimizer_tensors(optimizer, student, load_file(path / _FILES[1]))
    if rng:
        states = load_file(path / _FILES[2])
        mine = {key.partition("/")[0]: value for key, value in states.items() if key.endswith(f"/{rank}")}
        set_rng(mine)


def prune(root: Path, *, keep: int = 2, pinned: Collection[Path] = ()) -> None:
    """Delete all but the newest `keep` checkpoints, the pinned ones, and drafts of killed writers."""
    # the newest is the one just written; sizes tell torn ones apart without reading gigabytes
    whole = [path for path in _folders(root) if _right_sizes(path)]
    for path in _folders(root):
        if path not in {*whole[-keep:], *pinned}:
            shutil.rmtree(path, ignore_errors=True)
    for draft in root.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)

"""Checkpoints of a run: safetensors and JSON, written whole or not at all. No pickle is written or read.

    checkpoints/000012-boundary/  student.safetensors optimizer.safetensors rng.safetensors state.json manifest.json

Sharded, `student` and `optimizer` are one file per process, `student-00001-of-00002.safetensors`. The number counts the
checkpoints of a run; a `boundary` lies between two stages, a `stage` inside one.
A checkpoint is written beside its place and moved there by one rename; `manifest.json` holds the size and SHA-256 of
every file, so that a torn one is recognised and the one before it is used.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iskd.models.sharding import is_split, local, whole
from iskd.models.weights import load_model_tensors, model_tensors
from iskd.plan.run_files import CHECKPOINTS
from iskd.system import Json, Ranks, read_json, write_whole
from iskd.system.faults import NonFiniteError
from iskd.system.files import clear_place, readable_as_umask
from iskd.system.text import argument
from iskd.training.state.checkpoint_files import (
    _RNG,
    _STATE,
    BOUNDARY,
    STAGE,
    _entry,
    _folders,
    _order,
    _sync,
    _sync_folder,
)
from iskd.training.state.random_numbers import rng_tensors, set_rng
from iskd.training.state.run_state import RunState
from iskd.training.step.optimizer import load_optimizer_tensors, optimizer_tensors

_log = logging.getLogger(__name__)
T = TypeVar("T")
# what a full disk and a used-up quota are called where there is no error number
_FULL = ("No space left", "os error 28", "quota", "os error 122")


def save(
    root: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    ranks: Ranks,
    *,
    sharded: bool = False,
) -> Path:
    """Write one checkpoint below `root` and return its folder; called on every rank.

    Args:
        root: the run's `checkpoints` folder.
        student: its weights are saved.
        optimizer: its state is saved.
        state: the position; the random numbers of every rank are added.
        ranks: the processes of the run.
        sharded: every rank writes its own shards instead of rank 0 all that it gathered.

    Raises:
        OSError: with the path, the reason and what is intact, on every rank alike: the disk is full or not writable.
        NonFiniteError: a weight is not finite; such a checkpoint is never written.
    """
    finite = all(bool(torch.isfinite(local(value)).all()) for value in model_tensors(student).values())
    if ranks.any(not finite)[0]:
        raise NonFiniteError("a weight of the student is not finite")
    name = f"{1 + max(map(_order, _folders(root)), default=0):06d}-{STAGE if state.edited else BOUNDARY}"
    target = root / ranks.first(name)
    draft = root / f".draft-{target.name}"
    rng = ranks.gather(rng_tensors())
    try:
        together(ranks, target, lambda: _make(draft) if ranks.rank == 0 else None)
        tensors_of = {"student": model_tensors(student), "optimizer": optimizer_tensors(optimizer, student)}
        mine = {owner: held(tensors, ranks, sharded) for owner, tensors in tensors_of.items()}
        suffix = f"-{ranks.rank + 1:05d}-of-{ranks.size:05d}" if sharded else ""
        files = together(ranks, target, lambda: _write(draft, mine, suffix) if sharded or ranks.rank == 0 else {})
        entries = {name: entry for written in files for name, entry in written.items()}
        together(ranks, target, lambda: _finish(draft, target, rng, state, entries) if ranks.rank == 0 else None)
    except Exception:
        if ranks.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def together(ranks: Ranks, place: Path, work: Callable[[], T]) -> list[T]:
    """Do `work`, which writes below `place`, on every rank, and return all results.

    Raises:
        OSError: on every rank, when it failed on one: with the place, the reason and what is intact.
    """
    result, reason = None, None
    try:
        result = work()
    except (OSError, SafetensorError) as error:  # safetensors has no OSError of its own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            text in str(error) for text in _FULL
        )
        reason = f"the disk is full ({error})" if full else str(error)
    outcomes = ranks.gather((result, reason))
    failed = next((why for _, why in outcomes if why is not None), None)
    if failed is not None:
        run_dir = place.parents[1] if place.parent.name == CHECKPOINTS else place
        raise OSError(
            f"could not write the checkpoint {place}: {failed}. Earlier checkpoints are intact: make room or make the "
            f"folder writable, and continue with {argument('resume', run_dir)}"
        )
    return [cast(T, outcome) for outcome, _ in outcomes]


def _make(draft: Path) -> None:
    clear_place(draft)
    draft.mkdir(parents=True)


def held(tensors: Mapping[str, Tensor], ranks: Ranks, sharded: bool = False) -> dict[str, Tensor]:
    """What this rank writes: everything whole on rank 0, or every rank its shards and rank 0 what is not split."""
    mine = {}
    for name, value in tensors.items():
        split = is_split(value)
        value = local(value) if sharded else whole(value)  # the second is a collective: every rank comes by
        if (split and sharded and value.numel()) or (ranks.rank == 0 and not (split and sharded)):
            mine[name] = value.detach().cpu().contiguous()
    return mine


def _write(draft: Path, mine: Mapping[str, dict[str, Tensor]], suffix: str) -> dict[str, Json]:
    """Write this rank's files and return their entries in the manifest."""
    for owner, tensors in mine.items():
        save_file(tensors, draft / f"{owner}{suffix}.safetensors")
    return {name: _entry(draft / name) for name in (f"{owner}{suffix}.safetensors" for owner in mine)}


def _finish(draft: Path, target: Path, rng: list[dict[str, Tensor]], state: RunState, entries: dict[str, Json]) -> None:
    """Add what rank 0 alone writes, then move the folder to its place by one rename."""
    numbers = {f"{key}/{rank}": value for rank, states in enumerate(rng) for key, value in states.items()}
    save_file(numbers, draft / _RNG)
    readable_as_umask(draft)
    write_whole(draft / _STATE, json.dumps(state.to_json(), indent=1))
    entries = {**entries, **{name: _entry(draft / name) for name in (_RNG, _STATE)}}
    write_whole(draft / "manifest.json", json.dumps({"files": entries}, indent=1))
    _sync(draft)
    os.replace(draft, target)
    _sync_folder(target.parent)


class Stored(Mapping[str, Tensor]):
    """The tensors of the student or the optimizer in a checkpoint, one at a time; shards are joined along dim 0."""

    def __init__(self, path: Path, owner: str) -> None:
        # opened for the life of this object: the headers are parsed once
        self._files = [safe_open(file, "pt") for file in sorted(path.glob(f"{owner}*.safetensors"))]
        self._where: dict[str, list[Any]] = {}
        for file in self._files:
            for name in cast(Any, file).keys():  # noqa: SIM118 (not a mapping)
                self._where.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        pieces = [file.get_tensor(name) for file in self._where[name]]
        if any(piece.dtype != pieces[0].dtype or piece.shape[1:] != pieces[0].shape[1:] for piece in pieces):
            raise ValueError(f"the shards of {name!r} do not fit together")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._where)

    def __len__(self) -> int:
        """How many."""
        return len(self._where)


def read_state(path: Path) -> RunState:
    """Position of the run at a checkpoint."""
    return RunState.from_json(read_json(path / _STATE))


def restore(
    path: Path, student: nn.Module | None, optimizer: torch.optim.Optimizer | None, rank: int = 0, *, rng: bool = True
) -> None:
    """Load weights, optimizer state and random numbers of a checkpoint into objects of the right structure."""
    try:
        if student is not None:
            load_model_tensors(student, Stored(path, "student"))
        if student is not None and optimizer is not None:
            load_optimizer_tensors(optimizer, student, Stored(path, "optimizer"))
        if rng:
            states = load_file(path / _RNG)
            mine = {key.partition("/")[0]: value for key, value in states.items() if key.endswith(f"/{rank}")}
            if mine:  # a process that was not there when the checkpoint was written keeps the seed of its start
                set_rng(mine)
    except SafetensorError as error:
        raise ValueError(
            f"the checkpoint {path} cannot be read ({error}): delete it, and the one before is used"
        ) from error

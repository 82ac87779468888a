"""The processes of a run: which one this is, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds, and a command that asks which process it is may have no use for it
    import torch
    from torch import Tensor


def global_rank() -> int:
    """Rank among all processes of the run, 0-based.

    `RANK` is set by torchrun. SLURM sets `SLURM_PROCID`, which means a rank only in a step of several tasks: under one
    task, and in a batch script, the processes are Lightning's own, and those, as on one machine without SLURM, differ
    in `LOCAL_RANK`.
    """
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    if _number(os.environ, _STEP_TASKS, 1) > 1 and "SLURM_PROCID" in os.environ:
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_rank(environment: Mapping[str, str]) -> int:
    """Which of the run's processes on this machine this one is, 0-based: of torchrun, Lightning or a step of SLURM."""
    return _number(environment, "LOCAL_RANK" if "LOCAL_RANK" in environment else "SLURM_LOCALID", 0)


def started_together(environment: Mapping[str, str]) -> int:
    """How many processes were started together: by torchrun, by Lightning, or as tasks of a step of SLURM.

    A job's number of tasks (`SLURM_NTASKS`) says nothing by itself: without srun, one process has all of the job. Where
    nobody says how many there are, there are at least those up to this one's own rank.
    """
    for key in ("WORLD_SIZE", _STEP_TASKS):
        if environment.get(key, "").isdigit():
            return max(1, int(environment[key]))
    return 1 + max(_number(environment, key, 0) for key in ("RANK", "LOCAL_RANK"))


def one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether something else started this process as one of several, and has to start them again."""
    return started_together(environment) > 1


_STEP_TASKS = "SLURM_STEP_NUM_TASKS"  # srun sets it for what it starts, and salloc's own shell has 1


def _number(environment: Mapping[str, str], key: str, otherwise: int) -> int:
    found = environment.get(key, "")
    return int(found) if found.isdigit() else otherwise


class Ranks:
    """The processes of a run: who this one is, and how all agree. Every method is a collective.

    Attributes:
        rank, size: this process and how many there are. `device` is where NCCL exchanges values.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        import torch
        from torch import distributed as dist

        self.rank, self.size = rank, size
        nccl = size > 1 and dist.get_backend() == "nccl"  # it carries nothing but what lies on a device
        self._device = device if nccl and device is not None else torch.device("cpu")

    def first(self, value: Any) -> Any:
        """Rank 0's `value` (plain JSON) on every rank: decisions are made once."""
        if self.size == 1:
            return value
        from torch import distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        from torch import distributed as dist

        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true where it is so on any rank."""
        import torch

        return tuple(bool(vote) for vote in self.highest(torch.tensor([int(flag) for flag in flags])).tolist())

    def highest(self, values: Tensor) -> Tensor:
        """Each number's largest value over the ranks, on its own device; with NCCL the host does not wait for it."""
        if self.size == 1:
            return values
        from torch import distributed as dist

        votes = values.to(self._device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return votes.to(values.device)

    def add(self, values: Tensor) -> None:
        """Put the sum over the ranks into `values`, in place; the same bits on every rank."""
        if self.size == 1:
            return
        from torch import distributed as dist

        moved = values.to(self._device)
        dist.all_reduce(moved)
        values.copy_(moved)

    def require_equal(self, what: str, value: Any) -> None:
        """Raise the same ValueError on every rank when they do not have the same `value` (plain JSON)."""
        found = self.gather(value)
        if any(other != found[0] for other in found):
            listed = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(found))
            raise ValueError(f"the processes do not agree ({what}): {listed}. Do all see the same run directory?")

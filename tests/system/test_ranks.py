"""Which process of a run this one is, and how many there are, by what starts processes."""

from __future__ import annotations

import pytest

from iskd.system.ranks import global_rank, local_rank, one_of_several, started_together

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
SHELL = {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}

STARTED = {
    # what starts it: environment, rank, rank on this machine, how many were started together
    "by hand": ({}, 0, 0, 1),
    "torchrun": ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, 5, 1, 8),
    "torchrun of one": ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, 0, 0, 1),
    "Lightning": ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, 1, 2),
    "ranks alone": ({"RANK": "3", "LOCAL_RANK": "1"}, 3, 1, 4),
    "no numbers": ({"WORLD_SIZE": "", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "0"}, 1, 1, 1),
    "srun of several": ({**STEP, "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, 3, 1, 4),
    "srun of one": ({**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, 0, 0, 1),
    "srun of one, in a job of several": ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, 0, 0, 1),
    "Lightning under srun of one": (
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}, 2, 2, 4,
    ),
    "torchrun under srun of one a machine": (
        {**STEP, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8"},
        6, 2, 8,
    ),
    "a batch script without srun": (BATCH, 0, 0, 1),
    "Lightning in a batch script": ({**BATCH, "LOCAL_RANK": "3", "WORLD_SIZE": "4"}, 3, 3, 4),
    "salloc": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 0, 0, 1),
    "salloc, whose shell is a step": (SHELL, 0, 0, 1),
    "Lightning in such a shell": ({**SHELL, "LOCAL_RANK": "2", "WORLD_SIZE": "4"}, 2, 2, 4),
}  # fmt: skip
NAMES = {name for environment, *_ in STARTED.values() for name in environment}


@pytest.mark.parametrize("by", STARTED)
def test_processes_are_counted_in_one_way(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's number of tasks counts no processes: those of the step do, which srun alone starts."""
    environment, rank, local, count = STARTED[by]
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (global_rank(), local_rank(environment), started_together(environment)) == (rank, local, count)
    assert one_of_several(environment) == (count > 1)

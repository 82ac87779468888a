"""The rank of this process, from a launcher's variables: known before a trainer exists."""

from __future__ import annotations

import os


def global_rank() -> int:
    """Rank among all processes of the run, 0-based.

    `RANK` is set by torchrun. srun sets `SLURM_PROCID`, which means a rank only where it started several tasks: under
    one task the processes are Lightning's own, and those, as on one machine without SLURM, differ in `LOCAL_RANK`.
    """
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("LOCAL_RANK", "0"))

"""Many processes: which strategies are supported, how they meet, and what an edit means for them.

Decisions are made on rank 0 and broadcast as plain values; faults are agreed on before anybody acts on them, because a
rank that raises alone leaves the others waiting in a collective for ever. For the same reason the processes meet within
a bounded time: one that dies while it loads a teacher or refuses its config never comes to the process group, and
torch's own wait for it is that of a collective, half an hour. Each leaves its name in a store on rank 0's machine, at
the address where the process group will be made, and waits for the names of all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch.distributed import DistError, TCPStore

from iskd.models import sharding
from iskd.system import Ranks
from iskd.system.machine import usable_cores
from iskd.system.patches import before_joining
from iskd.training.step.adapters import IN_SHARDS

LIMIT = "ISKD_MEET_SECONDS"
"""Environment variable: seconds that the first process waits for the last one."""
_SECONDS = 300.0
_EACH = 1.0
_PER_CORE, _LEAST = 4, 8
"""Processes on a CPU: at most so many for a core, and so many anywhere."""


class FSDP2Strategy(ModelParallelStrategy):
    """`trainer=fsdp`: parameters, gradients and optimizer state in shards over all processes, no tensor parallelism.

    Lightning's own default gives the processes of a node to tensor parallelism.
    """

    def setup_environment(self) -> None:
        """Give every process to data parallelism; the number of processes is known from here on."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


def ranks_of(trainer: L.Trainer) -> Ranks:
    """The processes that a trainer has started or joined."""
    return Ranks(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)


def strategy_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Trainer settings with our own strategy in the place of its name, `fsdp`."""
    if settings.get("strategy") == "fsdp":
        return {**settings, "strategy": FSDP2Strategy()}
    return settings


def meet_first(trainer: L.Trainer) -> None:
    """Have a trainer's processes meet within a bounded time before it makes their process group."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy | ModelParallelStrategy):
        return

    def meeting(join: Callable[[], None]) -> None:
        cluster = strategy.cluster_environment
        assert cluster is not None
        strategy.set_world_ranks()
        met(strategy.global_rank, strategy.world_size, cluster.main_address, cluster.main_port, join)

    before_joining(
        strategy, "setup_distributed" if isinstance(strategy, DDPStrategy) else "_setup_distributed", meeting
    )


def met(rank: int, size: int, host: str, port: int, join: Callable[[], None]) -> None:
    """Wait for all processes, then `join` them.

    Args:
        rank: of this process.
        size: how many there are.
        host: address of rank 0's machine.
        port: where its store listens, the process group's after it.
        join: makes the process group; the store lives as long.

    Raises:
        TimeoutError: some did not come, with their ranks.
        ValueError: `ISKD_MEET_SECONDS` is no number above 0.
    """
    if size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        join()  # the agent of torchrun holds the store, and ends who is left
        return
    seconds = _limit()
    deadline = time.monotonic() + seconds
    try:
        store = TCPStore(
            host, port, size, rank == 0, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True
        )
        store.set(f"iskd/{rank}", "here")
        missing = set(range(size)) - {rank}
        while missing:
            missing = {other for other in missing if not store.check([f"iskd/{other}"])}
            if missing and time.monotonic() > deadline:
                raise _late(missing, seconds, host, port)
            time.sleep(_EACH / 10 if missing else 0)
    except DistError as error:
        if rank == 0:  # its own port
            raise
        raise _late({0}, seconds, host, port) from error
    join()


def _late(missing: set[int], seconds: float, host: str, port: int) -> TimeoutError:
    who = f"rank {', '.join(map(str, sorted(missing)))}"
    return TimeoutError(
        f"{who} did not come to {host}:{port} within {seconds:g} s: it ended before training began (see its last "
        f"lines), cannot reach that address, or needs longer to load ({LIMIT}=SECONDS)"
    )


def _limit() -> float:
    said = os.environ.get(LIMIT, str(_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{LIMIT}={said!r:.40}: set it to a number of seconds, or unset it")
    return seconds


def check_strategy(strategy: Strategy, *, edits: bool = True, adapters: bool = False) -> None:
    """Refuse strategies under which an edited model would train wrongly or get lost.

    Args:
        strategy: the trainer's.
        edits: whether the running model will be edited in this process.
        adapters: whether a stage trains adapters (schedule.train=lora).

    Raises:
        ValueError: with the reason and the alternative.
    """
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if isinstance(strategy, FSDP2Strategy):
        if adapters:
            raise ValueError(IN_SHARDS)
        if edits and sharding.UNTESTED is not None:
            raise ValueError(
                f"trainer=fsdp edits sharded models through private names of torch, and {sharding.UNTESTED}; "
                "use schedule.restart_at_edit=true, which needs none of them"
            )
        return
    if not isinstance(strategy, DDPStrategy):
        raise ValueError(
            f"strategy {type(strategy).__name__} is not supported; use trainer=cpu, trainer=gpu, trainer=ddp or "
            "trainer=fsdp"
        )
    if getattr(strategy, "_start_method", None) not in (None, "popen"):
        raise ValueError(
            "ddp_spawn and notebook strategies lose the edited student when their processes end; "
            "use trainer=ddp (a script that is launched again) or torchrun"
        )
    if strategy._ddp_kwargs.get("find_unused_parameters"):
        raise ValueError(
            "find_unused_parameters=True hides blocks that are not synchronised after an edit; leave it off"
        )


def check_processes(strategy: Strategy) -> None:
    """Raise ValueError where far more processes would be started on a CPU than it has cores: each holds all models."""
    if not starts_processes(strategy) or strategy.root_device.type != "cpu":
        return
    assert isinstance(strategy, DDPStrategy | ModelParallelStrategy)
    number, most = strategy.num_processes, max(_LEAST, _PER_CORE * usable_cores())
    if number > most:
        raise ValueError(
            f"trainer.devices={number} would start {number} processes, each with teacher and student of its own, "
            f"and a machine of {usable_cores()} cores takes at most {most}"
        )


def starts_processes(strategy: Strategy) -> bool:
    """Whether a fit would start other processes: there are several, and neither torchrun nor SLURM has."""
    if not isinstance(strategy, DDPStrategy | ModelParallelStrategy) or strategy.num_processes == 1:
        return False
    cluster = strategy.cluster_environment
    return cluster is not None and not cluster.creates_processes_externally


def whole_device(strategy: Strategy) -> torch.device:
    """Where a model that is not yet in shards can be whole: a model that needs FSDP2 may not fit on one device."""
    return torch.device("cpu") if isinstance(strategy, FSDP2Strategy) else strategy.root_device


def rewrap(strategy: Strategy) -> None:
    """Wrap the edited module again, so that the new parameters take part in gradient synchronisation.

    The old wrapper is dropped first: its reducer and hooks go with it, and the removed blocks are freed. Blocks under
    FSDP2 are sharded one by one (`iskd.models.sharding`) and need no wrapper.
    """
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.model_to_device()
        strategy.configure_ddp()

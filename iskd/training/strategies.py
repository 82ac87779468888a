"""Many processes: which strategies are supported, and what an edit means for them.

Decisions are made on rank 0 and broadcast as plain values; faults are agreed on before anybody acts on them, because a
rank that raises alone leaves the others waiting in a collective for ever.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy

from iskd.models import sharding
from iskd.system import Ranks
from iskd.system.meeting import met
from iskd.training.step.adapters import IN_SHARDS


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
    setup = getattr(strategy, "setup_distributed" if isinstance(strategy, DDPStrategy) else "_setup_distributed", None)
    if setup is None or not isinstance(strategy, DDPStrategy | ModelParallelStrategy):
        return

    def meeting() -> None:
        cluster = strategy.cluster_environment
        assert cluster is not None
        strategy.set_world_ranks()
        met(strategy.global_rank, strategy.world_size, cluster.main_address, cluster.main_port, setup)

    setattr(strategy, setup.__name__, meeting)


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

"""What an edit means for the strategy: nothing on one device, a new wrapper under DDP."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies under which an edited model would train wrongly or get lost.

    Raises ValueError with the reason and the alternative.
    """
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy):
        raise ValueError(
            f"strategy {type(strategy).__name__} is not supported; use trainer=cpu, trainer=gpu or trainer=ddp"
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


def rewrap(strategy: Strategy) -> None:
    """Wrap the edited module again, so that the new parameters take part in gradient synchronisation.

    The old wrapper is dropped first: its reducer and hooks go with it, and the removed blocks are freed.
    """
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.model_to_device()
        strategy.configure_ddp()


def from_rank_zero(trainer: L.Trainer, value: Any) -> Any:
    """Rank 0's `value` (plain JSON) on every rank: decisions are made once."""
    return trainer.strategy.broadcast(value, src=0)


def from_all_ranks(trainer: L.Trainer, value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered

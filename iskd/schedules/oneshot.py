"""All edits at once, then one healing stage with the whole budget: the shape of most published pruning and KD baselines."""

from __future__ import annotations

from collections.abc import Sequence

from iskd.plan import Stage
from iskd.schedules.base import History, RemoveLayers, ReplaceWith
from iskd.schedules.iterative import Iterative


class Oneshot:
    """Edits the first `count` layers of the order in one stage. Arguments as in `Iterative`; `count: -1` edits every layer
    that is not protected.
    """

    def __init__(
        self,
        edit: ReplaceWith | RemoveLayers,
        *,
        count: int | None = None,
        tokens: int = 100_000,
        order: str = "importance",
        layers: Sequence[int] | None = None,
        protect: Sequence[int] = (),
        floor: float | None = None,
        train: str = "all",
        lr: float = 1e-4,
        lr_new: float = 3e-4,
        seed: int = 0,
    ) -> None:
        self._arguments = {
            "tokens": tokens,
            "order": order,
            "layers": layers,
            "protect": protect,
            "floor": floor,
            "train": train,
            "lr": lr,
            "lr_new": lr_new,
            "seed": seed,
        }
        self._edit, self._count, self._protect = edit, count, protect
        self._inner = self._schedule(1 if count == -1 else count)
        self.floor, self.scoring = self._inner.floor, self._inner.scoring

    def _schedule(self, count: int | None) -> Iterative:
        schedule = Iterative(self._edit, count=count, **self._arguments)  # type: ignore[arg-type]
        schedule.per_stage = schedule.count
        return schedule

    def next_stage(self, history: History) -> Stage | None:
        """The single stage; None afterwards."""
        if history.stages:
            return None
        if self._count == -1:
            return self._schedule(history.record.num_layers - len(set(self._protect))).next_stage(history)
        return self._inner.next_stage(history)

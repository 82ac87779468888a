"""The shared body of the schedules that edit layer after layer of an order: which layers, how many, what budget."""

from __future__ import annotations

from collections.abc import Sequence

from iskd.plan import Stage, describe
from iskd.schedules.base import EditKind, History, check_floor, check_layers
from iskd.schedules.orders import NAMES, first_available, ordered


class LayerSchedule:
    """`count` layers are edited, `per_stage` at a time, with an equal share of `tokens` after each edit.

    Args:
        edit: what is done to a layer.
        count: how many layers are edited in all; -1 = every one that is not protected.
        per_stage: edits per stage; None = all in one stage.
        tokens: training tokens of the whole run.
        final_share: share of `tokens` that the last stage gets on top of its equal share of the rest, in [0, 1).
        order: a name of `iskd.schedules.orders.NAMES`; ignored when `layers` is given.
        layers: explicit order; then `count` defaults to its length.
        protect: layers that are never edited.
        rescore: with `order=importance`, score again before every stage.
        floor: retention below which a healed stage is rolled back and the run ends.
        restart_at_edit: save, end the process and carry out the edit in a fresh one (for trainer=fsdp on a torch whose
            private state iskd does not know, and for anything that must not be changed while it runs).
        train, lr, lr_new: what trains, at which rates (see `iskd.plan.Stage`).
        seed: seed of fresh weights.
    """

    def __init__(
        self,
        edit: EditKind,
        *,
        count: int | None = None,
        per_stage: int | None = 1,
        tokens: int = 100_000,
        final_share: float = 0.0,
        order: str = "importance",
        layers: Sequence[int] | None = None,
        protect: Sequence[int] = (),
        rescore: bool = False,
        floor: float | None = None,
        restart_at_edit: bool = False,
        train: str = "all",
        lr: float = 1e-4,
        lr_new: float = 3e-4,
        seed: int = 0,
    ) -> None:
        count = len(layers) if count is None and layers is not None else count
        if not count or (count < 1 and count != -1):
            raise ValueError(
                f"schedule.count={count}: nothing would be edited; give at least 1 (-1 = all), or use schedule=none"
            )
        if per_stage is not None and per_stage < 1:
            raise ValueError(f"schedule.per_stage must be at least 1, got {per_stage}")
        if tokens < 0 or not 0 <= final_share < 1:
            raise ValueError(
                f"schedule.tokens must be >= 0 and schedule.final_share in [0, 1), got {tokens} and {final_share}"
            )
        if layers is None and order not in NAMES:
            raise ValueError(f"schedule.order={order!r} is unknown; choose one of {', '.join(NAMES)}")
        self.edit, self.count, self.per_stage, self.tokens, self.final_share = (
            edit,
            count,
            per_stage,
            tokens,
            final_share,
        )
        self.restart_at_edit = restart_at_edit
        self.order, self.layers, self.protect, self.seed = order, layers, tuple(protect), seed
        self.train, self.lr, self.lr_new, self.floor = train, lr, lr_new, check_floor(floor)
        self.scoring = "never" if layers is not None or order != "importance" else ("each" if rescore else "once")

    def next_stage(self, history: History) -> Stage | None:
        """The next layers of the order; None once `count` layers are edited."""
        record, used = history.record, history.record.edited
        protected = check_layers(sorted(set(self.protect)), record, "protect")
        count = self.count if self.count > 0 else record.num_layers - len(protected)
        if not count:
            raise ValueError("schedule.count=-1 and every layer is in schedule.protect: nothing would be edited")
        if len(used) >= count:
            return None
        if self.layers is not None:
            order = check_layers(self.layers, record)
        else:
            order = ordered(self.order, record.num_layers, history.scores)
        wanted = min(self.per_stage or count, count - len(used))
        chosen = first_available(order, used, self.protect, wanted)
        if len(chosen) < wanted:
            raise ValueError(
                f"schedule.count={count}, but only {len(used) + len(chosen)} layers may be edited "
                f"(protected: {list(self.protect)}); lower the count or protect fewer"
            )
        edits = tuple(self.edit.make(layer, self.seed) for layer in chosen)
        return Stage(
            name=describe(edits),
            edits=edits,
            tokens=self._budget(len(history.stages), -(-count // (self.per_stage or count))),
            train=self.train,
            lr=self.lr,
            lr_new=self.lr_new,
            fit=self.edit.fit,
        )

    def _budget(self, index: int, stages: int) -> int:
        last = round(self.tokens * self.final_share)
        share = (self.tokens - last) // stages
        return share if index < stages - 1 else self.tokens - share * (stages - 1)

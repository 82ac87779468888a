"""The shared body of the schedules that edit layer after layer of an order: which layers, how many, what budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iskd.plan import Record, Stage
from iskd.plan.edits import describe
from iskd.plan.stage import lora_of
from iskd.schedules.base import Choice, EditKind, History, RemoveLayers, Target, check_floor, check_layers
from iskd.schedules.orders import NAMES, first_available, ordered

# by name of a choice of layers, the first one and the step to the next
NAMED = {"all": (0, 1), "every_second": (1, 2)}


class LayerSchedule:
    """Layers are edited until the target is reached, `per_stage` at a time, with an equal share of `tokens` after each.

    The target is one of `count`, `target_layers` and `target_params`.

    Args:
        edit: what is done to a layer.
        count: how many layers are edited in all; -1 = every one that is not protected.
        target_layers: remove until so many layers are left.
        target_params: remove until the student has at most so many parameters, embeddings included.
        per_stage: edits per stage; None = all in one stage.
        tokens: training tokens of the whole run.
        final_share: share of `tokens` that the last stage gets on top of its equal share of the rest, in [0, 1).
        order: a name of `iskd.schedules.orders.NAMES`; ignored when `layers` is given.
        layers: explicit order; then `count` defaults to its length. Or a name of `NAMED`: only these layers are edited,
            in the order that `order` says, all of them unless a target says otherwise.
        protect: layers that are never edited.
        protect_first, protect_last: so many layers at the bottom and at the top are never edited either.
        rescore: with `order=importance`, score again before every stage.
        candidates: how many choices of a stage's last layer `candidates_for` lists; 1 = only the best.
        trial_tokens: training tokens, on top of `tokens`, for which each of several candidates is healed before one is
            kept.
        floor: retention below which a healed stage is rolled back and the run ends.
        restart_at_edit: save, end the process and carry out the edit in a fresh one (for trainer=fsdp on a torch whose
            private state iskd does not know, and for anything that must not be changed while it runs).
        train, lr, lr_new: what trains, at which rates (see `iskd.plan.stage.Stage`).
        lora: rank, alpha and targets of the adapters of `train=lora` (see `iskd.plan.stage.LoraSpec`).
        seed: seed of fresh weights.

    Raises:
        ValueError: a value that cannot work; the message names its key.
    """

    def __init__(
        self,
        edit: EditKind,
        *,
        count: int | None = None,
        target_layers: int | None = None,
        target_params: int | None = None,
        per_stage: int | None = 1,
        tokens: int = 100_000,
        final_share: float = 0.0,
        order: str = "importance",
        layers: str | Sequence[int] | None = None,
        protect: Sequence[int] = (),
        protect_first: int = 0,
        protect_last: int = 0,
        rescore: bool = False,
        candidates: int = 1,
        trial_tokens: int = 0,
        floor: float | None = None,
        restart_at_edit: bool = False,
        train: str = "all",
        lr: float = 1e-4,
        lr_new: float = 3e-4,
        lora: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.named = layers if isinstance(layers, str) else None
        if self.named is not None and self.named not in NAMED:
            raise ValueError(
                f"schedule.layers={self.named!r} is unknown; choose {', '.join(NAMED)} or a list of layers"
            )
        layers = None if isinstance(layers, str) else layers
        if count is target_layers is target_params is None:
            count = -1 if self.named else None if layers is None else len(layers)
        self.target = Target(count, target_layers, target_params)
        if self.target.count is None and not isinstance(edit, RemoveLayers):
            raise ValueError(f"{self.target} is for edit=remove; say how many layers are edited with schedule.count")
        if per_stage is not None and per_stage < 1:
            raise ValueError(f"schedule.per_stage must be at least 1, got {per_stage}")
        if tokens < 0 or not 0 <= final_share < 1:
            raise ValueError(
                f"schedule.tokens must be >= 0 and schedule.final_share in [0, 1), got {tokens} and {final_share}"
            )
        if layers is None and order not in NAMES:
            raise ValueError(f"schedule.order={order!r} is unknown; choose one of {', '.join(NAMES)}")
        if protect_first < 0 or protect_last < 0:
            raise ValueError(
                f"schedule.protect_first and protect_last must be >= 0 layers, got {protect_first} and {protect_last}"
            )
        if candidates < 1 or trial_tokens < 0 or (candidates > 1) != (trial_tokens > 0):
            raise ValueError(
                f"schedule.candidates={candidates} and schedule.trial_tokens={trial_tokens} do not fit: several "
                "candidates are compared after a short healing each; give both, or candidates=1 and trial_tokens=0"
            )
        self.edit, self.per_stage, self.tokens, self.final_share = edit, per_stage, tokens, final_share
        self.restart_at_edit, self.candidates, self.trial_tokens = restart_at_edit, candidates, trial_tokens
        self.order, self.layers, self.seed, self.removes = order, layers, seed, isinstance(edit, RemoveLayers)
        self.protect, self.protect_first, self.protect_last = tuple(protect), protect_first, protect_last
        self.train, self.lr, self.lr_new, self.floor = train, lr, lr_new, check_floor(floor)
        self.lora = lora_of(lora, train, seed)
        self.scoring = "never" if layers is not None or order != "importance" else ("each" if rescore else "once")

    def complete(self, history: History) -> bool:
        """Whether the target is reached; reads no scores."""
        return self.target.reached(history, self._protected(history.record))

    def next_stage(self, history: History) -> Stage | None:
        """The next layers of the order; None once the target is reached."""
        return next(iter(self.candidates_for(history)), None)

    def choice(self, history: History) -> Choice:
        """All layers that may still be edited, and how many of them the next scores decide on.

        Scored once, that is all that are left to edit; for a size in parameters the order of all of them counts.
        """
        record, protected = history.record, self._protected(history.record)
        available = first_available(record.layers, record.edited, protected, len(record.layers))
        by_size = self.target.params is not None
        left = len(available) if by_size else self.target.left(history, available, protected)
        number = min(self.per_stage or left, left) if self.scoring == "each" else left
        return Choice(tuple(available), number, self.candidates - 1)

    def candidates_for(self, history: History) -> list[Stage]:
        """The next stage with the best choice of layers, then with the next best in place of its last layer, and so on.

        At most `candidates` stages, fewer where no more layers may be edited; none once the target is reached.

        Raises:
            ValueError: the target does not fit the teacher, or too few layers may be edited.
        """
        if self.complete(history):
            return []
        record, protected = history.record, self._protected(history.record)
        if self.layers is not None:
            order = check_layers(self.layers, record)
        else:
            order = ordered(self.order, record.num_layers, history.scores)
        available = first_available(order, record.edited, protected, len(order))
        left = self.target.left(history, available, protected)
        number = min(self.per_stage or left, left)
        tokens = self._budget(history.stages, -(-left // number))
        best, others = available[:number], available[number : number + self.candidates - 1]
        return [self._stage([*best[:-1], last], tokens) for last in (best[-1], *others)]

    def _stage(self, layers: Sequence[int], tokens: int) -> Stage:
        edits = tuple(self.edit.make(layer, self.seed) for layer in layers)
        how: dict[str, Any] = {"train": self.train, "lr": self.lr, "lr_new": self.lr_new, "lora": self.lora}
        return Stage(describe(edits), edits, tokens, fit=self.edit.fit, **how)

    def _protected(self, record: Record) -> list[int]:
        """Layers that are never edited, ascending."""
        depth = record.num_layers
        ends = [*range(depth)[: self.protect_first], *range(depth)[max(0, depth - self.protect_last) :]]
        first, step = NAMED[self.named or "all"]
        others = set(range(depth)) - set(range(first, depth, step))
        return sorted({*check_layers(sorted(set(self.protect)), record, "protect"), *ends, *others})

    def _budget(self, done: Sequence[Stage], left: int) -> int:
        """Tokens of the next of `left` stages; what the stages before it were given is never given again."""
        last = round(self.tokens * self.final_share)
        rest = self.tokens - sum(stage.tokens for stage in done)
        if left == 1:
            return rest
        # how many stages there will be may change on the way, where blocks of several sizes are scored again
        return max(0, min((self.tokens - last) // (len(done) + left), (rest - last) // left))

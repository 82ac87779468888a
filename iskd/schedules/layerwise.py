"""The shared body of the schedules that edit layer after layer of an order: which layers, how many, what budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from pydantic import PositiveFloat

from iskd.plan import Stage
from iskd.plan.edits import describe
from iskd.schedules.base import Choice, History
from iskd.schedules.orders import first_available
from iskd.schedules.settings import Heal, Layers
from iskd.schedules.target import Target


@dataclass(frozen=True)
class LayerSchedule(Layers, Heal):
    """Layers are edited until the target is reached, with an equal share of `tokens` after each stage.

    The target is one of `count`, `attention_share`, `target_layers` and `target_params`. Keys beside those of `Layers`
    and `Heal`:

    Attributes:
        target_layers: remove until so many layers are left.
        target_params: remove until the student has at most so many parameters, embeddings included.
        final_share: share of `tokens` that the last stage gets on top of its equal share of the rest, in [0, 1]. At 1
            the stages before it only edit (and refit), and one curve of the rates covers all training, in which all
            blocks that they put in are new.
        refit_share: share of their calibration text that refits read after every edit but the last, in [0, 1]. What
            they do there serves the choice of the next layer: the last one solves all survivors again. 0 = it alone.
        rescore: with `order=importance`, score again before every stage.
        candidates: how many choices of a stage's last layer `candidates_for` lists; 1 = only the best.
        trial_tokens: training tokens, on top of `tokens`, for which each of several candidates is healed before one is
            kept.
        floor: retention below which a healed stage is rolled back and the run ends. A run is refused in which it would
            judge a stage before anything heals it (`final_share=1` with `refit_share=0`, or without a refit).
        lr_new: learning rate of the blocks and mixers that a stage inserts.

    Raises:
        ValueError: a value that cannot work; the message names its key.
    """

    takes: ClassVar[tuple[str, ...]] = ("edit", "seed")
    _: KW_ONLY
    target_layers: int | None = None
    target_params: int | None = None
    final_share: float = 0.0
    refit_share: float = 1.0
    rescore: bool = False
    candidates: int = 1
    trial_tokens: int = 0
    floor: float | None = None
    lr_new: PositiveFloat = 3e-4

    def __post_init__(self) -> None:
        """Check the values."""
        Layers.__post_init__(self)
        if self.target.count is self.target.kept is None and not self.removes:
            raise ValueError(
                f"{self.target} is for edit=remove and edit=merge; say how many layers are edited with schedule.count"
            )
        if self.tokens < 0 or not 0 <= self.final_share <= 1:
            raise ValueError(
                "schedule.tokens must be >= 0 and schedule.final_share in [0, 1], got "
                f"{self.tokens} and {self.final_share}"
            )
        if self.epochs is not None and self.final_share not in (0, 1):
            raise ValueError(
                f"schedule.final_share={self.final_share} shares out schedule.tokens, and schedule.epochs="
                f"{self.epochs:g} gives every stage as much: set schedule.final_share=0, or 1 to train after the last "
                "edit alone"
            )
        if not 0 <= self.refit_share <= 1:
            raise ValueError(f"schedule.refit_share must be in [0, 1], got {self.refit_share}")
        if self.candidates < 1 or self.trial_tokens < 0 or (self.candidates > 1) != (self.trial_tokens > 0):
            raise ValueError(
                f"schedule.candidates={self.candidates} and schedule.trial_tokens={self.trial_tokens} do not fit: "
                "several candidates are compared after a short healing each; give both, or candidates=1 and "
                "trial_tokens=0"
            )
        if self.floor is not None and not 0 < self.floor <= 1:
            raise ValueError(f"schedule.floor must be in (0, 1] (student's score / teacher's score), got {self.floor}")
        Heal.__post_init__(self)

    @property
    def target(self) -> Target:
        """When enough layers are edited; without a word about it, when those that `layers` names are."""
        count = self.count
        if self.attention_share is not None:
            return Target(count, self.target_layers, self.target_params, self.attention_share)
        if count is self.target_layers is self.target_params is None:
            count = -1 if isinstance(self.layers, str) else None if self.layers is None else len(self.layers)
        return Target(count, self.target_layers, self.target_params)

    @property
    def edits_per_stage(self) -> int | None:
        """Edits of every stage but the last; None = all in one."""
        return None

    @property
    def removes(self) -> bool:
        """Whether edits leave fewer layers."""
        return self.edit.removes

    @property
    def scoring(self) -> str:
        """When scores are computed: never for a list or another order, else once or, with `rescore`, for each stage."""
        return "never" if self.listed is not None or self.order != "importance" else "each" if self.rescore else "once"

    def complete(self, history: History) -> bool:
        """Whether the target is reached; reads no scores."""
        return self.target.reached(history, self.protected(history.record))

    def choice(self, history: History) -> Choice:
        """All layers that may still be edited, and how many of them the next scores decide on.

        Scored once, that is all that are left to edit; for a size in parameters the order of all of them counts.
        """
        record, protected = history.record, self.protected(history.record)
        available = first_available(record.layers, self.used(history), protected, len(record.layers))
        by_size = self.target.params is not None
        left = len(available) if by_size else self.target.left(history, available, protected)
        number = min(self.edits_per_stage or left, left) if self.scoring == "each" else left
        if self.scoring == "each":
            available = self.open_among(available, history)
        return Choice(tuple(available), min(number, len(available)), self.candidates - 1)

    def open_among(self, available: Sequence[int], history: History) -> list[int]:
        """Those of the layers that may be edited which the next stage may take, in their order; here all."""
        return list(available)

    def chosen(self, history: History) -> list[int] | None:
        """All layers that are still to be edited, the first one first; None where what comes later decides on some.

        Raises ValueError as `candidates_for` does.
        """
        if self.scoring == "each" or self.candidates > 1 or (self.scoring == "once" and history.scores is None):
            return None
        available, left = self._open(history)
        return available[:left]

    def _open(self, history: History) -> tuple[list[int], int]:
        """The layers that may still be edited, in order, and how many of them are."""
        protected = self.protected(history.record)
        order = self.in_order(history.record, history.scores)
        available = first_available(order, self.used(history), protected, len(order))
        return available, self.target.left(history, available, protected)

    def candidates_for(self, history: History) -> list[Stage]:
        """The next stage with the best choice of layers, then with the next best in place of its last layer, and so on.

        At most `candidates` stages, fewer where no more layers may be edited; none once the target is reached.

        Raises:
            ValueError: the target does not fit the teacher, or too few layers may be edited.
        """
        if self.complete(history):
            return []
        available, left = self._open(history)
        number = min(self.edits_per_stage or left, left)
        stages = -(-left // number)
        available = self.open_among(available, history)
        number = min(number, len(available))
        tokens, share = self._budget(history, stages), self.refit_share if stages > 1 else 1.0
        best, others = available[:number], available[number : number + self.candidates - 1]
        return [self._stage([*best[:-1], last], tokens, share) for last in (best[-1], *others)]

    def _stage(self, layers: Sequence[int], tokens: int, refit_share: float) -> Stage:
        edits = tuple(self.edit.make(layer, self.seed) for layer in layers)
        how: dict[str, Any] = {
            "train": self.train, "lr": self.lr, "lr_new": self.lr_new, "refit_share": refit_share,
        }  # fmt: skip
        return Stage(describe(edits), edits, tokens, fit=self.edit.fit, lora=self.adapters(self.seed), **how)

    def _budget(self, history: History, left: int) -> int:
        """Tokens of the next of `left` stages; what the stages before it were given is never given again."""
        done = history.stages
        tokens = self.budget(history, 1 if self.final_share == 1 else len(done) + left)
        last = round(tokens * self.final_share)
        rest = tokens - sum(stage.tokens for stage in done)
        if left == 1:
            return rest
        # how many stages there will be may change on the way, where blocks of several sizes are scored again
        return max(0, min((tokens - last) // (len(done) + left), (rest - last) // left))

"""What schedules are told, each value once: the keys of `schedule` that several of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat

from iskd.plan import Record
from iskd.plan.stage import LoraSpec, lora_of
from iskd.plan.token_budget import ON_CPU
from iskd.schedules.base import History
from iskd.schedules.edits import ConvertTo, EditKind, MergeLayers
from iskd.schedules.orders import NAMES, first_available, ordered

# by name of a choice of layers, the first one and the step to the next
NAMED = {"all": (0, 1), "every_second": (1, 2)}


def _lora() -> dict[str, Any]:
    return {"rank": LoraSpec.rank, "alpha": LoraSpec.alpha, "targets": LoraSpec.targets}


@dataclass(frozen=True, kw_only=True)
class Heal:
    """How the student is trained; of every schedule.

    Attributes:
        tokens: training tokens of the whole run; a command asks its machine where nobody says (`plan.token_budget`).
        epochs: in the place of `tokens`: passes over the training text in every stage that trains; of `schedule=align`,
            whose stages are shares of one budget, in the whole run. Stages then see the same text, each in an order of
            its own; of `data=mix` as many tokens as all sources have, drawn by their weights, which are of some sources
            more than a pass and of others less.
        train: what trains (see `iskd.plan.stage.Stage`).
        lr: learning rate of everything that trains but new blocks.
        lora: rank, alpha and targets of the adapters of `train=lora` (see `iskd.plan.stage.LoraSpec`).

    Raises:
        ValueError: a value that cannot work; the message names its key.
    """

    tokens: NonNegativeInt = ON_CPU
    epochs: PositiveFloat | None = None
    train: str = "all"
    lr: PositiveFloat = 1e-4
    lora: Mapping[str, Any] | None = field(default_factory=_lora)

    def __post_init__(self) -> None:
        """Check the values."""
        self.adapters()

    def budget(self, history: History, stages: int = 1) -> int:
        """Training tokens of a run of which so many stages train.

        Raises ValueError where it is told in passes over a text whose size nobody knows, or that come to nothing.
        """
        if self.epochs is None:
            return self.tokens
        if history.pass_tokens is None:
            raise ValueError(
                f"schedule.epochs={self.epochs:g} counts passes over the training text, whose size is not known here: "
                "set schedule.epochs=null and schedule.tokens"
            )
        found = round(self.epochs * history.pass_tokens)
        if not found:
            raise ValueError(
                f"schedule.epochs={self.epochs:g} is no token of a text of {history.pass_tokens:,}: give more"
            )
        return found * stages

    def adapters(self, seed: int = 0) -> LoraSpec:
        """The adapters of every stage that has some; `seed` is the run's."""
        return lora_of(self.lora, self.train, seed)


@dataclass(frozen=True)
class Layers:
    """Which layers are edited, how, and in which order; of every schedule that edits.

    Attributes:
        edit: what is done to a layer.
        count: how many layers are edited in all; -1 = every one that is not protected.
        attention_share: instead of `count`, with `edit=convert`: share of the teacher's layers, in (0, 1), that keep
            their attention, rounded up to whole layers; protected ones count among them.
        order: a name of `iskd.schedules.orders.NAMES`; ignored when `layers` is a list.
        layers: explicit order; then `count` defaults to its length. Or a name of `NAMED`: only these layers are edited,
            in the order that `order` says, all of them unless a target says otherwise.
        protect: layers that are never edited.
        protect_first, protect_last: so many layers at the bottom and at the top are never edited either.
        restart_at_edit: save, end the process and carry out the edit in a fresh one (for trainer=fsdp on a torch whose
            private state iskd does not know, and for anything that must not be changed while it runs).
        seed: of fresh weights and adapters.

    Raises:
        ValueError: a value that cannot work; the message names its key.
    """

    edit: EditKind
    _: KW_ONLY
    count: int | None = None
    attention_share: float | None = None
    order: str = "importance"
    layers: str | Sequence[int] | None = None
    protect: Sequence[int] = ()
    protect_first: int = 0
    protect_last: int = 0
    restart_at_edit: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "protect", tuple(self.protect))
        if self.attention_share is not None and not isinstance(self.edit, ConvertTo):
            raise ValueError("schedule.attention_share is for edit=convert; say how many layers go by schedule.count")
        if isinstance(self.layers, str) and self.layers not in NAMED:
            raise ValueError(
                f"schedule.layers={self.layers!r} is unknown; choose {', '.join(NAMED)} or a list of layers"
            )
        if self.listed is None and self.order not in NAMES:
            raise ValueError(f"schedule.order={self.order!r} is unknown; choose one of {', '.join(NAMES)}")
        if self.protect_first < 0 or self.protect_last < 0:
            raise ValueError(
                "schedule.protect_first and protect_last must be >= 0 layers, got "
                f"{self.protect_first} and {self.protect_last}"
            )

    @property
    def listed(self) -> Sequence[int] | None:
        """The explicit order, where there is one."""
        return None if isinstance(self.layers, str) else self.layers

    def used(self, history: History) -> Sequence[int]:
        """Layers that are not edited again; a list may name some that were edited before this schedule began."""
        return history.record.edited if self.listed is None else history.own

    def may_edit(self, history: History) -> list[int]:
        """All layers that may still be edited, ascending; reads no scores."""
        record = history.record
        among = record.layers if self.listed is None else self.in_order(record, None)
        return sorted(first_available(among, self.used(history), self.protected(record), record.num_layers))

    def chosen(self, history: History) -> list[int] | None:
        """All layers that are still to be edited, the first one first; None where that is not known yet."""
        return None

    def in_order(self, record: Record, scores: Mapping[int, float] | None) -> list[int]:
        """All layers that may ever be edited, protected ones among them, the first to be edited first.

        Raises ValueError when the list or the order does not fit the teacher, or scores are missing.
        """
        if self.listed is not None:
            return check_layers(self.listed, record)
        return ordered(self.order, record.num_layers, scores)

    def protected(self, record: Record) -> list[int]:
        """Layers that are never edited, ascending."""
        depth = record.num_layers
        if isinstance(self.edit, ConvertTo):
            self.edit.check(depth)
        ends = [*range(depth)[: self.protect_first], *range(depth)[max(0, depth - self.protect_last) :]]
        first, step = NAMED[self.layers if isinstance(self.layers, str) else "all"]
        others = set(range(depth)) - set(range(first, depth, step))
        if isinstance(self.edit, MergeLayers):
            others.add(0)  # no block below could take it over
        return sorted({*check_layers(sorted(set(self.protect)), record, "protect"), *ends, *others})


def check_layers(layers: Sequence[int], record: Record, key: str = "layers") -> list[int]:
    """Layers of `schedule.<key>` as given, after checking that each exists once."""
    for layer in layers:
        if not 0 <= layer < record.num_layers:
            raise ValueError(f"schedule.{key} names layer {layer}; the teacher has layers 0..{record.num_layers - 1}")
    twice = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if twice:
        raise ValueError(f"schedule.{key} lists layer {twice[0]} twice; name each layer once")
    return list(layers)

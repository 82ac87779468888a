"""What becomes of every layer within a budget: the option it gets, what that costs and is predicted to lose; a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from iskd.plan.edits import MAX_LAYERS
from iskd.system import Json, number, read_json, write_whole
from iskd.system.reading import Count, Number, between, read_as
from iskd.system.text import byte_unit

KEEP = "keep"
"""The name of the choice to leave a layer as it is."""
_VERSION = 1
_NAME = Annotated[str, Field(max_length=256)]
_MOST = Field(max_length=MAX_LAYERS)
_Amounts = Annotated[dict[str, Number], Field(max_length=16)]


@dataclass(frozen=True)
class TriedPlan:
    """A plan that was built and measured beside the one that was taken; see `iskd.schedules.budget.choosing`.

    `added` is its KL by added scores, `predicted` what the other measured plans make of that, `refitted` that of the
    plans which were refitted as a whole.
    """

    choice: Annotated[tuple[_NAME, ...], _MOST]
    predicted: Number
    measured: Number
    found: Annotated[str, Field(max_length=256)] = ""
    added: Number | None = None
    refitted: Number | None = None


@dataclass(frozen=True)
class BudgetPlan:
    """What becomes of every layer of a teacher.

    Attributes:
        teacher: hex SHA-256 of its weights and config (`iskd.models.weights.model_sha256`).
        choice: the name of an option for every layer, `keep` where it stays as it is.
        options: what the names mean, as in `budget.options`.
        seed: of fresh weights.
        asked: the limits as they were given. limits: as amounts of a whole student.
        request: hex SHA-256 of all that decides what a search finds: limits, options, settings, text, seed.
        teacher_costs, costs: amounts of the teacher and of the student; exact but for times, which are predicted.
        others: of these, what lies outside the blocks.
        measured: amounts that were measured on the whole student. finished: on that of the run, once it is there.
        predicted_kl, measured_kl: nats per token on text held out for scores, of a student of blocks that the library
            has fitted one by one; the run fits them anew and trains.
        added_kl: by added scores as they are, which mostly say too little.
        refitted_kl: of this plan on the same text, refitted as a whole; None = the search refitted none.
        rank_correlation: Spearman's, of predicted and measured KL over the plans that were measured for this budget and
            the others of the same search. compared: how many these were.
        found: by what the plan was found.
        scores: by layer the KL of every option alone.
        tried: the plans that were measured, the best first; refitted ones before others.
        front: shares of the blocks and predicted KL, by single scores, in the limit that was asked for first.
        seconds: what the library, the scores and the search took.
        context, batch: at which cache and time count.
        native: whether it was to be opened by plain transformers.

    Raises:
        ValueError: a layer gets what is no option.
    """

    teacher: Annotated[str, Field(max_length=64)]
    choice: Annotated[tuple[_NAME, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    options: Annotated[dict[str, Json], Field(max_length=1000)]
    seed: Count = 0
    asked: Annotated[dict[str, Any], Field(max_length=16)] = field(default_factory=dict)
    limits: _Amounts = field(default_factory=dict)
    request: Annotated[str, Field(max_length=64)] = ""
    teacher_costs: _Amounts = field(default_factory=dict)
    costs: _Amounts = field(default_factory=dict)
    others: _Amounts = field(default_factory=dict)
    measured: _Amounts = field(default_factory=dict)
    finished: _Amounts = field(default_factory=dict)
    predicted_kl: Number = float("nan")
    measured_kl: Number = float("nan")
    added_kl: Number | None = None
    refitted_kl: Number | None = None
    rank_correlation: Number | None = None
    compared: Count = 0
    found: Annotated[str, Field(max_length=256)] = ""
    scores: Annotated[tuple[dict[str, Number], ...], _MOST] = ()
    tried: Annotated[tuple[TriedPlan, ...], Field(max_length=10_000)] = ()
    front: Annotated[tuple[tuple[Number, Number], ...], Field(max_length=10_000)] = ()
    seconds: _Amounts = field(default_factory=dict)
    context: Annotated[int, between(1)] = 1
    batch: Annotated[int, between(1)] = 1
    native: bool = False
    version: Annotated[int, between(1, _VERSION)] = _VERSION

    def __post_init__(self) -> None:
        """Check that the names mean something."""
        for layer, name in enumerate(self.choice):
            if name != KEEP and name not in self.options:
                raise ValueError(f"layer {layer} gets {name!r:.80}, which is no option of the plan")

    def to_json(self) -> Json:
        """Plain JSON."""
        return json.loads(json.dumps(asdict(self)))

    def write(self, file: Path) -> Path:
        """Write the plan file."""
        return write_whole(file, json.dumps(self.to_json(), indent=1))


def plan_of(data: Any, what: str) -> BudgetPlan:
    """A plan from JSON that anybody may have written. Raises ValueError where it is none."""
    return read_as(BudgetPlan, data, what)


def read_plan(file: Path) -> BudgetPlan:
    """A plan file.

    Raises:
        ValueError: there is no such file, or it holds no plan.
    """
    try:
        data = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"budget.plan={file}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"budget.plan={file} cannot be read: {error}") from None
    return plan_of(data, str(file))


def check_teacher(plan: BudgetPlan, digest: str, layers: int, what: str) -> None:
    """Raise ValueError where a plan was made for another teacher."""
    if len(plan.choice) != layers:
        raise ValueError(f"{what} was made for a teacher of {len(plan.choice)} layers, and this one has {layers}")
    if plan.teacher != digest:
        raise ValueError(f"{what} was made for another teacher (other weights): search again with this one")


def choice_map(plan: BudgetPlan) -> list[tuple[str, list[int]]]:
    """By option the layers that get it, kept layers first, the others as the plan lists them."""
    names = dict.fromkeys((KEEP, *plan.options))
    found = [(name, [layer for layer, other in enumerate(plan.choice) if other == name]) for name in names]
    return [(name, layers) for name, layers in found if layers]


def amount(key: str, value: float) -> str:
    """An amount of a limit or a cost for people, in its unit."""
    if key == "params":
        return f"{value:,.0f}"
    if key in ("bytes", "cache_bytes"):
        unit, name = byte_unit(value)
        return f"{number(value / unit, 4)} {name}"
    return f"{number(value)} ms"

"""Students of a choice: that share all they can with their teacher, for passes, or that have weights of their own.

A choice names an option for every layer of the teacher. What stands at each position then is a `Place`: the teacher's
own block, a fitted one, or nothing. A merge puts its block one position lower and leaves nothing at its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel

from iskd.blocks.identity import Identity
from iskd.models import Stack, surgery
from iskd.models.hosting import HostedBlock
from iskd.models.projections import with_submodule
from iskd.models.stack import set_layer_idx
from iskd.plan import Edit, Record
from iskd.plan.budget_plan import KEEP, BudgetPlan, choice_map
from iskd.schedules.budget.options import Option, layers_of, option_of

LOADERS = "plain transformers, vLLM and llama.cpp"
At = TypeVar("At")  # the layer of an option, or all its layers
Choice = tuple[str, ...]
"""The name of an option, or `KEEP`, for every layer."""
Place = tuple[int, str] | Literal["keep", "gone"]
"""A fitted block by layer and option, or what needs none."""


def places(choice: Sequence[str], options: Mapping[str, Option]) -> list[Place]:
    """What stands at every position. Merges are above kept layers only, as the solver has it."""
    found: list[Place] = []
    for layer, name in enumerate(choice):
        option = None if name == KEEP else options[name]
        if option is None:
            found.append("keep")
        elif option.merges:
            found[-1] = (layer, name)
            found.append("gone")
        else:
            found.append("gone" if option.removes else (layer, name))
    return found


def assembled(teacher: PreTrainedModel, blocks: Mapping[int, nn.Module | None]) -> PreTrainedModel:
    """The teacher with other blocks at some positions; None = one that does nothing, at full depth.

    Everything else is the teacher's own, and the same object.
    """
    stack = Stack(teacher)
    every: list[nn.Module] = list(stack.layers)
    for position, block in blocks.items():
        every[position] = HostedBlock(Identity(), stack.family).eval() if block is None else block
        set_layer_idx(every[position], position)
    layers = nn.ModuleList(every)
    layers.training = stack.layers.training
    path = f"{stack.family.base}.{stack.family.layers}"
    student = with_submodule(teacher, path, layers)
    assert isinstance(student, PreTrainedModel)
    return student


def edits_to(choice: Choice, options: Mapping[str, Option], seed: int) -> list[Edit]:
    """The edits that make a choice, in the order to carry them out."""
    chosen = [(options[name], layer) for layer, name in enumerate(choice) if name != KEEP]
    return [option.make(layer, seed) for option, layer in in_order(chosen)]


def uniform(teacher: PreTrainedModel, option: Option, seed: int) -> tuple[PreTrainedModel, Record]:
    """A student without memory that has an option in every layer, or in the topmost where it removes; its record."""
    stack = Stack(teacher)
    where = layers_of(option, stack)
    return made(teacher, [option.make(layer, seed) for layer in (where[-1:] if option.removes else where)])


def made(teacher: PreTrainedModel, edits: Iterable[Edit]) -> tuple[PreTrainedModel, Record]:
    """A student without memory after some edits, and its record."""
    record = Record(len(Stack(teacher).layers)).extended(edits)
    return surgery.rebuild(teacher, record, "meta"), record


def natives(
    options: Sequence[Option],
    teacher: PreTrainedModel,
    native: Callable[[PreTrainedModel], bool],
    seed: int,
    *,
    named: bool,
) -> tuple[list[Option], list[str]]:
    """The options of which the loaders open a student that has one everywhere, and sentences about the others.

    Raises:
        ValueError: one that is not was named, or none is left.
    """
    stack = Stack(teacher)

    def opened(option: Option) -> bool:
        """Above a gap layers stand where others stood, which may be what plain transformers does not expect."""
        low = [made(teacher, [option.make(layers_of(option, stack)[0], seed)])] if option.removes else []
        return all(native(student) for student, _ in (*low, uniform(teacher, option, seed)))

    good = [option for option in options if opened(option)]
    others = [option.name for option in options if option not in good]
    if others and named:
        raise ValueError(
            f"budget.native=true, and not all of {LOADERS} open a student with {', '.join(others)}: leave "
            f"{'it' if len(others) == 1 else 'them'} out of budget.use, or set budget.native=false"
        )
    if not good:
        raise ValueError(
            f"budget.native=true: not all of {LOADERS} open a student with any of {', '.join(others)}: give other "
            "options (remove, merge, slim), or set budget.native=false"
        )
    told = [f"options {', '.join(others)} are left out: not all of {LOADERS} open such a student"] if others else []
    return good, told


# ---- of a plan -------------------------------------------------------------------------------------------------------


def used(plan: BudgetPlan) -> list[tuple[Option, list[int]]]:
    """The options that some layer gets, each with its layers, in the order to carry them out: merges, removals, others.

    Raises ValueError where an option of the plan is described wrongly.
    """
    chosen = [(name, layers) for name, layers in choice_map(plan) if name != KEEP]
    return in_order([(option_of(name, plan.options[name]), layers) for name, layers in chosen])


def in_order(chosen: Sequence[tuple[Option, At]]) -> list[tuple[Option, At]]:
    """Options in the order to carry them out: merges, removals, others."""
    return sorted(chosen, key=lambda each: (not each[0].merges, not each[0].removes))


def edits_of(plan: BudgetPlan) -> list[Edit]:
    """All edits of a plan, in the order to carry them out.

    Raises ValueError where they cannot be applied to a teacher of so many layers.
    """
    edits = [option.make(layer, plan.seed) for option, layers in used(plan) for layer in layers]
    Record(len(plan.choice)).extended(edits)
    return edits


@dataclass(frozen=True)
class AsPlanned:
    """Edits of a plan, to each layer what was chosen for it: all in one stage, where fits know each other.

    Attributes:
        options: that some layer gets, by name, as `budget.options` has them.
        choice: the name of an option, or `KEEP`, for every layer.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    options: Mapping[str, Any]
    choice: Sequence[str]

    @property
    def removes(self) -> bool:
        """Whether layers go."""
        return any(option.removes for option in self._made.values())

    @property
    def fit(self) -> bool:
        """Whether there are blocks to fit to calibration text before training."""
        return any(option.kind.fit for option in self._made.values())

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer."""
        return self._made[self.choice[layer]].make(layer, seed)

    @cached_property
    def _made(self) -> dict[str, Option]:
        return {name: option_of(name, values) for name, values in self.options.items()}


def steps_of(plan: BudgetPlan) -> list[dict[str, Any]]:
    """A plan as the only step of `schedule=mixed`, in full; no step for the teacher itself."""
    found = used(plan)
    if not found:
        return []
    options = {option.name: option.described() for option, _ in found}
    edit = {"_target_": f"{__name__}.{AsPlanned.__name__}", "_recursive_": False, "options": options}
    layers = [layer for _, layers in found for layer in layers]
    return [{"edit": {**edit, "choice": [*plan.choice]}, "schedule": "oneshot", "layers": layers}]

"""The options of a layer: edits with the settings of their parts, by name, as data."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.blocks import check_mergeable
from iskd.blocks.base import FitData
from iskd.blocks.merge import side_by_side, unlike
from iskd.models import Stack, surgery
from iskd.models.block_calls import BlockCalls
from iskd.plan import Convert, Edit, Record, Replace, Spec
from iskd.plan.budget_plan import KEEP, BudgetPlan, choice_map
from iskd.plan.edits import REMOVALS, Merge
from iskd.schedules.edits import ConvertTo, EditKind, MergeLayers, RemoveLayers, ReplaceWith
from iskd.system.text import perhaps
from iskd.system.typed_values import read_value, takes

EDITS: Mapping[str, type[Any]] = {
    "replace": ReplaceWith,
    "remove": RemoveLayers,
    "merge": MergeLayers,
    "convert": ConvertTo,
}
_PARTS = ("block", "mixer")
_MADE_BY = {"block": "from_block", "mixer": "from_attention"}
_EXAMPLES = {
    "block": "{_target_: iskd.blocks.slim.Slim, ratio: 0.5}",
    "mixer": "{_target_: iskd.mixers.gla.GLA}",
}
_EXAMPLE = "{edit: remove}"
_TRIAL = (2, 8)  # windows and tokens on which an option is tried
At = TypeVar("At")  # the layer of an option, or all its layers


@dataclass(frozen=True)
class Option:
    """What may be done to a layer.

    Attributes:
        name: of the option.
        edit: one of `EDITS`.
        kind: makes the edit of a layer.
    """

    name: str
    edit: str
    kind: EditKind

    @property
    def removes(self) -> bool:
        """Whether the layer is gone afterwards."""
        return self.kind.removes

    @property
    def merges(self) -> bool:
        """Whether the block below takes it over."""
        return isinstance(self.kind, MergeLayers)

    @property
    def fitted(self) -> bool:
        """Whether there is a block to fit."""
        return not isinstance(self.kind, RemoveLayers)

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer."""
        return self.kind.make(layer, seed)

    def described(self) -> dict[str, Any]:
        """As `budget.options` has it."""
        values = {key: value for key, value in asdict(self.kind).items() if key not in _PARTS}
        for key in _PARTS:
            if (spec := getattr(self.kind, key, None)) is not None:
                values[key] = {"_target_": spec.target, **spec.kwargs}
        return {"edit": self.edit, **values}

    @property
    def digest(self) -> str:
        """What it is, whatever it is called."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:16]


def options_of(described: Mapping[str, Any], use: Sequence[str] | None = None) -> list[Option]:
    """The options by name, all of them or those of `use`.

    Raises:
        ValueError: there is none, `use` names one that there is not, one is described wrongly, or two are the same.
    """
    if not described or (use is not None and not use):
        key = "options={}" if not described else "use=[]"
        raise ValueError(
            f"budget.{key} leaves nothing that could be done to a layer: give options, e.g. budget.use=[remove]"
        )
    if not isinstance(described, Mapping):
        raise ValueError(f"budget.options={described!s:.80} are no options: give them by name, as {{NAME: {_EXAMPLE}}}")
    if KEEP in described:
        raise ValueError(f"budget.options.{KEEP}: a layer can always be kept, so this name is taken; choose another")
    names = list(described) if use is None else list(use)
    for name in names:
        if name not in described:
            near = perhaps(str(name), described)
            raise ValueError(f"budget.use names {name!r}{near}, and the options are {', '.join(map(str, described))}")
        if names.count(name) > 1:
            raise ValueError(f"budget.use names {name!r} twice; name each option once")
        if use is not None and described[name] is None:
            raise ValueError(f"budget.use names {name!r}, and budget.options.{name} is null: leave one of them out")
    found = [_option(name, described[name]) for name in names if described[name] is not None]
    if not found:
        raise ValueError("budget.options: every option is null, so nothing could be done to a layer: give one")
    named: dict[str, str] = {}
    for option in found:
        if option.digest in named:
            raise ValueError(
                f"budget.options.{option.name} is the same as budget.options.{named[option.digest]}: leave one out"
            )
        named[option.digest] = option.name
    return found


def _option(name: str, values: Any) -> Option:
    where = f"budget.options.{name}"
    edit = values.get("edit") if isinstance(values, Mapping) else None
    if not isinstance(edit, str) or edit not in EDITS:
        said = f"={edit!s:.80} is no edit" if edit is not None else f"={values!s:.80} says nothing of an edit"
        key = f"{where}.edit" if edit is not None else where
        raise ValueError(f"{key}{said}: say what is done to the layer, with edit: {', '.join(EDITS)}")
    rest = {key: value for key, value in values.items() if key != "edit"}
    kind: Any = EDITS[edit]
    known = [*kind.takes, *(key for key in kind.__dataclass_fields__ if key not in (*_PARTS, "mixers"))]
    if rest.pop("mixers", None) is not None:
        raise ValueError(f"{where}.mixers: an option has one mixer; make an option of each, and drop mixers")
    for key in rest:
        if key in _PARTS and key not in kind.takes:
            raise ValueError(
                f"{where}.{key} does not go with edit: {edit}; drop it, or give your option a name that is not taken"
            )
        if key not in known:
            near = perhaps(str(key), known)
            raise ValueError(f"{where}.{key} is no key{near}: use {', '.join(known)}")
        if key not in _PARTS:
            rest[key] = read_value(f"{where}.{key}", rest[key], *takes(kind)[key])
    for part in kind.takes:
        rest[part] = _spec(f"{where}.{part}", part, rest.get(part))
    try:
        return Option(name, edit, kind(**rest))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _spec(where: str, part: str, values: Any) -> Spec:
    """A block or mixer that is named in full, and can be imported."""
    if not isinstance(values, Mapping) or not isinstance(values.get("_target_"), str):
        said = "is not given" if values is None else f"is {values!s:.80}"
        raise ValueError(f"{where} {said}: name the class, as in {_EXAMPLES[part]}")
    found = Spec(values["_target_"], {str(key): value for key, value in values.items() if key != "_target_"})
    try:
        made = found.resolve()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not hasattr(made, _MADE_BY[part]):
        raise ValueError(f"{where}={found.target} is no {part}: name one, as in {_EXAMPLES[part]}")
    return found


# ---- what a teacher can have -----------------------------------------------------------------------------------------


def layers_of(option: Option, stack: Stack) -> list[int]:
    """The layers of a teacher to which an option may be done.

    A merge needs a layer below whose attention is like its own: elsewhere a run removes the layer instead.
    """
    layers = stack.layers
    if not option.merges:
        return list(range(len(layers)))
    return [at for at in range(1, len(layers)) if not unlike(layers[at - 1], layers[at], stack)]


@torch.no_grad()
def module_of(option: Option, stack: Stack, layer: int, seed: int) -> nn.Module | None:
    """What an option puts in at a layer of the teacher, before any fit; None = nothing is left there.

    Of a merge, the block of the layer below. Nothing in it is shared with the teacher.
    """
    edit, old = option.make(layer, seed), stack.layers[layer]
    if isinstance(edit, Merge):
        return copy.deepcopy(stack.layers[layer - 1])
    if isinstance(edit, REMOVALS):
        return None
    if isinstance(edit, Replace):
        return copy.deepcopy(surgery.build_block(stack, old, edit))
    assert isinstance(edit, Convert)
    return copy.deepcopy(surgery.build_converted(stack, old, edit))


@torch.no_grad()
def able(
    options: Sequence[Option], teacher: PreTrainedModel, seed: int, *, named: bool
) -> tuple[list[Option], list[str]]:
    """The options that this teacher can have on its device, and sentences about the others.

    Each is tried on its last layer: made, and run on a few tokens.

    Args:
        options: to be tried.
        teacher: in evaluation mode, where it will be used.
        seed: of fresh weights.
        named: whether the user has named them: then one that fails is an error.

    Raises:
        ValueError: a named option fails, or none is left.
    """
    stack = Stack(teacher)
    ids = torch.zeros(_TRIAL, dtype=torch.long, device=teacher.device)
    calls, depth = BlockCalls(stack, ids), len(stack.layers)
    found, told = list[Option](), list[str]()
    for option in options:
        where = layers_of(option, stack)
        try:
            if not where:
                raise ValueError("the teacher has no two neighbours whose attentions see the same tokens and positions")
            Record(depth).extended([option.make(where[-1], seed)])
            at = where[-1] - option.merges
            module = module_of(option, stack, where[-1], seed)
            if option.merges:
                check_mergeable(stack)
                side_by_side(stack.layers[at], stack.layers[at + 1], _trial(calls, at, stack))
            if module is not None and not calls.run(at, module, calls.embedded).isfinite().all():
                raise ValueError("what it says of a few tokens is not finite")
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # parts and their kernels fail in their own ways
            said = f"option {option.name} cannot be had on {teacher.device.type}: {' '.join(str(error).split()):.300}"
            if named:
                raise ValueError(f"{said}; leave it out of budget.use, or run elsewhere (trainer=cpu)") from error
            told.append(f"{said}; it is left out")
        else:
            found.append(option)
    if not found:
        raise ValueError(f"none of the options can be had here: {'; '.join(told)}")
    return found, told


def _trial(calls: BlockCalls, position: int, stack: Stack) -> FitData:
    """Something to run a block on."""
    return FitData([calls.embedded], [calls.embedded], lambda block, h, _: calls.run(position, block, h), stack)


# ---- of a plan -------------------------------------------------------------------------------------------------------


def used(plan: BudgetPlan) -> list[tuple[Option, list[int]]]:
    """The options that some layer gets, each with its layers, in the order to carry them out: merges, removals, others.

    Raises ValueError where an option of the plan is described wrongly.
    """
    chosen = [(name, layers) for name, layers in choice_map(plan) if name != KEEP]
    return in_order([(_option(name, plan.options[name]), layers) for name, layers in chosen])


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


def steps_of(plan: BudgetPlan) -> list[dict[str, Any]]:
    """A plan as the steps of `schedule=mixed`, every part in full: a step for each option, all training in the last.

    What survives is refitted once, when all is edited.
    """
    steps: list[dict[str, Any]] = []
    for option, layers in used(plan):
        described = option.described()
        parts = {key: described.pop(key) for key in _PARTS if key in described}
        del described["edit"]
        kind = {"_target_": f"{type(option.kind).__module__}.{type(option.kind).__qualname__}", **described}
        steps.append({"edit": kind, **parts, "schedule": "oneshot", "layers": layers, "tokens": 0, "refit": {}})
    if steps:
        del steps[-1]["tokens"], steps[-1]["refit"]
    return steps

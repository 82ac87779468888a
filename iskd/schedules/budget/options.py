"""The options of a layer: edits with the settings of their parts, by name, as data."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.blocks import check_mergeable
from iskd.blocks.base import FitData
from iskd.blocks.merge import side_by_side, unlike
from iskd.models import Stack, surgery
from iskd.models.block_calls import BlockCalls
from iskd.plan import Convert, Edit, Record, Replace, Spec
from iskd.plan.budget_plan import KEEP
from iskd.plan.edits import REMOVALS, Merge
from iskd.schedules.edits import ConvertTo, EditKind, MergeLayers, RemoveLayers, ReplaceWith
from iskd.system.text import layers_text, perhaps
from iskd.system.typed_values import read_value, takes

EDITS: Mapping[str, type[Any]] = {
    "replace": ReplaceWith,
    "remove": RemoveLayers,
    "merge": MergeLayers,
    "convert": ConvertTo,
}
PARTS = ("block", "mixer")
_MADE_BY = {"block": "from_block", "mixer": "from_attention"}
_EXAMPLES = {
    "block": "{_target_: iskd.blocks.slim.Slim, ratio: 0.5}",
    "mixer": "{_target_: iskd.mixers.gla.GLA}",
}
_EXAMPLE = "{edit: remove}"
_NO_PAIR = "the teacher has no two neighbours whose attentions see the same tokens and positions"
_TRIAL = (2, 8)  # windows and tokens on which an option is tried


@dataclass(frozen=True)
class Option:
    """What may be done to a layer.

    Attributes:
        name: of the option.
        edit: one of `EDITS`.
        kind: makes the edit of a layer.
        layers: of the teacher, at which it can be had; None = wherever an edit of its kind can be.
    """

    name: str
    edit: str
    kind: EditKind
    layers: tuple[int, ...] | None = None

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
        values = {key: value for key, value in asdict(self.kind).items() if key not in PARTS}
        for key in PARTS:
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
    found = [option_of(name, described[name]) for name in names if described[name] is not None]
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


def kinds_among(options: Iterable[Option]) -> list[list[str]]:
    """Names of options that differ in numbers alone, kind by kind; nothing where all do."""
    kinds: dict[object, list[str]] = {}
    for option in options:
        parts = [value for value in option.described().values() if isinstance(value, Mapping)]
        named = [name for part in parts for name in (part["_target_"], *sorted(part))]
        kinds.setdefault((option.edit, *named), []).append(option.name)
    return [*kinds.values()] if len(kinds) > 1 else []


def option_of(name: str, values: Any) -> Option:
    """One option, as `budget.options` has it. Raises ValueError where it is described wrongly."""
    where = f"budget.options.{name}"
    edit = values.get("edit") if isinstance(values, Mapping) else None
    if not isinstance(edit, str) or edit not in EDITS:
        said = f"={edit!s:.80} is no edit" if edit is not None else f"={values!s:.80} says nothing of an edit"
        key = f"{where}.edit" if edit is not None else where
        raise ValueError(f"{key}{said}: say what is done to the layer, with edit: {', '.join(EDITS)}")
    rest = {key: value for key, value in values.items() if key != "edit"}
    kind: Any = EDITS[edit]
    known = [*kind.takes, *(key for key in kind.__dataclass_fields__ if key not in (*PARTS, "mixers"))]
    if rest.pop("mixers", None) is not None:
        raise ValueError(f"{where}.mixers: an option has one mixer; make an option of each, and drop mixers")
    for key in rest:
        if key in PARTS and key not in kind.takes:
            raise ValueError(
                f"{where}.{key} does not go with edit: {edit}; drop it, or give your option a name that is not taken"
            )
        if key not in known:
            near = perhaps(str(key), known)
            raise ValueError(f"{where}.{key} is no key{near}: use {', '.join(known)}")
        if key not in PARTS:
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
    layers, some = stack.layers, option.layers
    found = [at for at in range(len(layers)) if some is None or at in some]
    return [at for at in found if at and not unlike(layers[at - 1], layers[at], stack)] if option.merges else found


def kinds_of(stack: Stack) -> list[int]:
    """For every layer the lowest one that has modules of the same types and sizes, and sees as far."""
    first: dict[object, int] = {}
    return [first.setdefault(_kind(block, stack), at) for at, block in enumerate(stack.layers)]


def _kind(block: nn.Module, stack: Stack) -> object:
    types = tuple((name, type(module)) for name, module in block.named_modules())
    sizes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    attention = dict(block.named_modules()).get(stack.family.attn)
    return types, sizes, tuple(getattr(attention, name, None) for name in ("sliding_window", "use_rope", "layer_type"))


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

    Each is tried on a layer of every kind: made, and run on a few tokens.

    Args:
        options: to be tried.
        teacher: in evaluation mode, where it will be used.
        seed: of fresh weights.
        named: whether the user has named them: then one that fails everywhere is an error.

    Raises:
        ValueError: a named option fails, or none is left.
    """
    stack, found, told = Stack(teacher), list[Option](), list[str]()
    ids, kinds = torch.zeros(_TRIAL, dtype=torch.long, device=teacher.device), kinds_of(stack)
    calls = BlockCalls(stack, ids)
    for option in options:
        # by the kind of the layer, and for a merge of the one below
        groups: dict[tuple[int, ...], list[int]] = {}
        for layer in layers_of(option, stack):
            groups.setdefault((*kinds[layer - option.merges : layer], kinds[layer]), []).append(layer)
        there, failed = list[int](), dict[str, list[int]]()
        for layers in groups.values():
            try:
                _try(option, calls, layers[-1], stack, seed)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # parts and their kernels fail in their own ways
                said = " ".join(str(error).split()) or type(error).__name__
                failed.setdefault(f"{said:.300}", []).extend(layers)
            else:
                there += layers
        what = f"option {option.name} cannot be had on {teacher.device.type}"
        if there:
            found.append(replace(option, layers=tuple(sorted(there))) if failed else option)
            told += [f"{what} in layers {layers_text(sorted(where))}: {why}" for why, where in failed.items()]
            continue
        said = f"{what}: {'; '.join(failed) or _NO_PAIR}"
        if named:
            raise ValueError(f"{said}; leave it out of budget.use, or run elsewhere (trainer=cpu)")
        told.append(f"{said}; it is left out")
    if not found:
        raise ValueError(f"none of the options can be had here: {'; '.join(told)}")
    return found, told


def _try(option: Option, calls: BlockCalls, layer: int, stack: Stack, seed: int) -> None:
    """Make an option of a layer, and run it on a few tokens. Raises whatever its parts raise."""
    Record(len(stack.layers)).extended([option.make(layer, seed)])
    at = layer - option.merges
    module = module_of(option, stack, layer, seed)
    if option.merges:
        check_mergeable(stack)
        side_by_side(stack.layers[at], stack.layers[at + 1], _trial(calls, at, stack))
    if module is not None and not calls.run(at, module, calls.embedded).isfinite().all():
        raise ValueError("what it says of a few tokens is not finite")


def _trial(calls: BlockCalls, position: int, stack: Stack) -> FitData:
    """Something to run a block on."""
    return FitData([calls.embedded], [calls.embedded], lambda block, h, _: calls.run(position, block, h), stack)

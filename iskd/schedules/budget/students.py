"""Students of a choice: that share all they can with their teacher, for passes, or that have weights of their own.

A choice names an option for every layer of the teacher. What stands at each position then is a `Place`: the teacher's
own block, a fitted one, or nothing. A merge puts its block one position lower and leaves nothing at its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from iskd.blocks.identity import Identity
from iskd.models import Stack, surgery
from iskd.models.hosting import HostedBlock
from iskd.models.projections import with_submodule
from iskd.models.stack import set_layer_idx
from iskd.models.weights import load_model_tensors, model_tensors
from iskd.plan import Edit, Record
from iskd.plan.budget_plan import KEEP
from iskd.schedules.budget.library import Library
from iskd.schedules.budget.options import Option, in_order

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


def apart(
    teacher: PreTrainedModel, choice: Choice, options: Mapping[str, Option], library: Library, seed: int
) -> tuple[PreTrainedModel, Record, list[Edit]]:
    """A student at its own depth that shares nothing with its teacher, with the blocks of a library; its edits.

    Args:
        teacher: it is copied.
        choice: an option for every layer.
        options: by name.
        library: of fitted options.
        seed: of fresh weights.
    """
    chosen = [(options[name], layer) for layer, name in enumerate(choice) if name != KEEP]
    edits = [option.make(layer, seed) for option, layer in in_order(chosen)]
    student = copy.deepcopy(teacher)
    record = surgery.apply(student, Record(len(choice)), edits)
    blocks = dict(zip(record.layers, Stack(student).layers, strict=True))
    for position, place in enumerate(places(choice, options)):
        if isinstance(place, tuple):
            fitted = library.block(place[0], options[place[1]])
            assert fitted is not None
            load_model_tensors(blocks[position], model_tensors(fitted))
    return student, record, edits

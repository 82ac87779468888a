"""Linear maps inside a block, by name, in the layouts that families have."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from iskd.models.stack import Stack


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Assign the submodule at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def with_submodule(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """A copy of `root` with `module` at a dotted path; every other submodule and parameter is the same object."""
    twin = copy.copy(root)
    # a plain copy shares the dicts of submodules and hooks with the original
    vars(twin).update({key: copy.copy(value) for key, value in vars(root).items() if isinstance(value, dict)})
    head, _, rest = path.partition(".")
    setattr(twin, head, with_submodule(root.get_submodule(head), rest, module) if rest else module)
    return twin


def weight_of(projection: nn.Module) -> Tensor:
    """Weight of a projection as [out, in]; GPT-2 stores its projections as Conv1D, weight [in, out]."""
    weight = projection.get_parameter("weight")
    return weight if isinstance(projection, nn.Linear) else weight.T


def stacked(values: Tensor, stack: Stack) -> tuple[Tensor, ...]:
    """Queries, keys and values of the rows of one matrix that holds them in this order, or of its bias.

    The block may have fewer heads than the model, in whole key-value groups.
    """
    queries = stack.dims.heads // stack.dims.kv_heads  # times as wide as the keys
    keys = values.shape[0] // (queries + 2)
    return values.split([queries * keys, keys, keys])


def qkv_of(attention: nn.Module, stack: Stack) -> list[tuple[Tensor, Tensor | None]]:
    """Weight [out, in] and bias [out] (or None) of an attention's queries, keys and values, taken apart if fused."""
    family = stack.family
    found: list[tuple[Tensor, Tensor | None]] = []
    for path in family.qkv:
        projection = attention.get_submodule(path.removeprefix(f"{family.attn}."))
        found.append((weight_of(projection), getattr(projection, "bias", None)))
    if not family.fused:
        return found
    (weight, bias), width = found[0], stack.dims.head_dim

    def third(values: Tensor, index: int) -> Tensor:
        if family.fused in ("thirds", "stacked"):
            return stacked(values, stack)[index]
        return values.unflatten(0, (-1, 3, width))[:, index].flatten(0, 1)

    return [(third(weight, index), None if bias is None else third(bias, index)) for index in range(3)]

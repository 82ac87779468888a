"""Cutting heads and channels out of a transformer block, whatever way its family stores its projections."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iskd.models import Stack
from iskd.models.families import Family
from iskd.models.projections import set_submodule, weight_of


def unit_size(projection: nn.Module) -> int:
    """Parameters of one output unit of a projection: its weights and its bias."""
    return inputs_of(projection) + int(getattr(projection, "bias", None) is not None)


def transposed(projection: nn.Module) -> bool:
    """GPT-2 stores its projections as Conv1D, weight [in, out]."""
    return not isinstance(projection, nn.Linear)


def inputs_of(projection: nn.Module) -> int:
    """Input features of a projection."""
    return weight_of(projection).shape[1]


def group_width(stack: Stack) -> int:
    """Width of one key-value group's attention output: its query heads times the head width."""
    return stack.dims.heads // stack.dims.kv_heads * stack.dims.head_dim


@torch.no_grad()
def cut(old: nn.Module, stack: Stack, groups: Tensor, channels: Tensor) -> nn.Module:
    """A copy of the block that keeps only the given key-value groups and MLP channels."""
    dims, family = stack.dims, stack.family
    queries = _expand(groups, group_width(stack))
    keys = _expand(groups, dims.head_dim)
    new = copy.deepcopy(old)
    for path, index in zip(
        family.qkv, _qkv_rows(family, dims.hidden, dims.head_dim, groups, queries, keys), strict=True
    ):
        set_submodule(new, path, take(new.get_submodule(path), index, dim=0))
    set_submodule(new, family.out, take(new.get_submodule(family.out), queries, dim=1))
    for path in family.ups:
        set_submodule(new, path, take(new.get_submodule(path), channels, dim=0))
    set_submodule(new, family.down, take(new.get_submodule(family.down), channels, dim=1))
    attention = new.get_submodule(family.attn)
    for name, value in (("num_heads", len(queries) // dims.head_dim), ("split_size", len(queries))):
        if hasattr(attention, name):
            setattr(attention, name, value)
    return new


def _expand(units: Tensor, width: int) -> Tensor:
    """Indices of all features of some units that are `width` features wide."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _qkv_rows(
    family: Family, hidden: int, head_dim: int, groups: Tensor, queries: Tensor, keys: Tensor
) -> Sequence[Tensor]:
    if family.fused == "thirds":
        return [torch.cat([queries, queries + hidden, queries + 2 * hidden])]
    if family.fused == "heads":
        return [_expand(groups, 3 * head_dim)]
    return [queries, keys, keys]


def take(projection: nn.Module, index: Tensor, *, dim: int) -> nn.Module:
    """A projection with only some outputs (`dim=0`) or inputs (`dim=1`); index [n] counts features."""
    new = copy.deepcopy(projection)
    weight = weight_of(projection).index_select(dim, index)
    new.weight = nn.Parameter((weight.T if transposed(projection) else weight).contiguous())
    bias = getattr(projection, "bias", None)
    if bias is not None and dim == 0:
        new.bias = nn.Parameter(bias.index_select(0, index))
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = weight.shape
    elif hasattr(new, "nf"):
        vars(new).update(nf=weight.shape[0], nx=weight.shape[1])  # Conv1D's own names
    return new

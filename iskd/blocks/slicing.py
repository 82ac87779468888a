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
    third = weight_of(old.get_submodule(family.qkv[0])).shape[0] // 3
    for path, index in zip(family.qkv, _qkv_rows(family, third, dims.head_dim, groups, queries, keys), strict=True):
        set_submodule(new, path, take(new.get_submodule(path), index, dim=0))
    set_submodule(new, family.out, take(new.get_submodule(family.out), queries, dim=1))
    for path in family.ups:
        set_submodule(new, path, take(new.get_submodule(path), channels, dim=0))
    set_submodule(new, family.down, take(new.get_submodule(family.down), channels, dim=1))
    set_width(new, stack)
    return new


def set_width(block: nn.Module, stack: Stack) -> None:
    """Tell an attention that knows its own width how many heads it has now."""
    attention = block.get_submodule(stack.family.attn)
    width = inputs_of(block.get_submodule(stack.family.out))
    for name, value in (("num_heads", width // stack.dims.head_dim), ("split_size", width)):
        if hasattr(attention, name):
            setattr(attention, name, value)


def _expand(units: Tensor, width: int) -> Tensor:
    """Indices of all features of some units that are `width` features wide."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _qkv_rows(
    family: Family, third: int, head_dim: int, groups: Tensor, queries: Tensor, keys: Tensor
) -> Sequence[Tensor]:
    if family.fused == "thirds":
        return [torch.cat([queries, queries + third, queries + 2 * third])]
    if family.fused == "heads":
        return [_expand(groups, 3 * head_dim)]
    return [queries, keys, keys]


def take(projection: nn.Module, index: Tensor, *, dim: int) -> nn.Module:
    """A projection with only some outputs (`dim=0`) or inputs (`dim=1`); index [n] counts features."""
    weight, bias = weight_of(projection).index_select(dim, index), getattr(projection, "bias", None)
    return resized(projection, weight, bias.index_select(0, index) if bias is not None and dim == 0 else bias)


def resized(projection: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A projection of the same kind with weight [out, in] and bias [out]."""
    new = copy.deepcopy(projection)
    new.weight = nn.Parameter((weight.T if transposed(projection) else weight).contiguous())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone())
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = weight.shape
    elif hasattr(new, "nf"):
        vars(new).update(nf=weight.shape[0], nx=weight.shape[1])  # Conv1D's own names
    return new

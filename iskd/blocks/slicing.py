"""Cutting heads and channels out of a transformer block, whatever way its family stores its projections."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

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
    places = _qkv_places(old, stack)
    for path, index in zip(family.qkv, _qkv_rows(family, places, dims.head_dim, groups, queries, keys), strict=True):
        set_submodule(new, path, take(new.get_submodule(path), index, dim=0))
    for path, index in zip(family.qk_norms, (queries, keys), strict=False):
        _narrow(new, path, index, dims.head_dim)
    set_submodule(new, family.out, take(new.get_submodule(family.out), queries, dim=1))
    for path in family.ups:
        width = weight_of(old.get_submodule(path)).shape[0] // family.fused_ups
        rows = torch.cat([channels + width * part for part in range(family.fused_ups)])
        set_submodule(new, path, take(new.get_submodule(path), rows, dim=0))
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
    if stack.family.fused == "stacked":  # where its queries end is read off the config, which is the model's
        heads = width // stack.dims.head_dim
        groups = heads * stack.dims.kv_heads // stack.dims.heads
        own: Any = copy.copy(attention.config)
        own.num_attention_heads = heads
        own.num_key_value_heads = groups
        vars(attention).update(config=own, num_key_value_heads=groups)


def _qkv_places(block: nn.Module, stack: Stack) -> tuple[int, ...]:
    """Where queries, keys and values begin among the rows of one matrix."""
    rows = weight_of(block.get_submodule(stack.family.qkv[0])).shape[0]
    if stack.family.fused != "stacked":
        return 0, rows // 3, 2 * (rows // 3)
    queries = stack.dims.heads // stack.dims.kv_heads
    keys = rows // (queries + 2)
    return 0, queries * keys, (queries + 1) * keys


def _narrow(block: nn.Module, path: str, index: Tensor, head_dim: int) -> None:
    """Keep the gains of a norm of queries or keys that is as wide as their projection; one of a head's width stays."""
    try:
        norm = block.get_submodule(path)
    except AttributeError:
        return
    gain = norm.get_parameter("weight")
    if gain.numel() > head_dim:
        norm.weight = nn.Parameter(gain.detach().index_select(0, index))


def _expand(units: Tensor, width: int) -> Tensor:
    """Indices of all features of some units that are `width` features wide."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _qkv_rows(
    family: Family, places: tuple[int, ...], head_dim: int, groups: Tensor, queries: Tensor, keys: Tensor
) -> Sequence[Tensor]:
    if family.fused in ("thirds", "stacked"):
        return [torch.cat([rows + place for rows, place in zip((queries, keys, keys), places, strict=True)])]
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

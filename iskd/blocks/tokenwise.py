"""The replaced block without attention: each token is mapped by itself, or nothing stands there; the MLP re-solved.

What is left is the host's own block, in which a small module answers where the attention stood, so that norms,
residuals and MLP of every family stay as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from iskd.blocks.base import FitData
from iskd.blocks.choosing import down_system, solve_down, write
from iskd.blocks.ridge import Ridge
from iskd.models import CacheSlot, Stack
from iskd.models.families import Family
from iskd.models.projections import set_submodule


class Tokenwise:
    """The replaced block whose attention is one linear map of each token alone, or nothing.

    `linear=false`: nothing, as in arXiv 2406.15786; the norm before it goes too, and the MLP is re-solved all the same.

    Source: NBL (arXiv 2505.21077, section 3): W = C_yx C_xx^-1, here by ridge regression; the MLP behind it, ours
    Needs: calibration tokens (`run.fit_tokens`)
    Costs: a D x D matrix and a bias in the place of the attention, no cache
    Measured: not measured
    """

    @classmethod
    def from_block(
        cls, old: nn.Module, stack: Stack, *, linear: bool = True, ridge: NonNegativeFloat | None = None
    ) -> nn.Module:
        """The block with a zero map where its attention stood; `ridge` is used by `fit`.

        Raises ValueError for a block without an attention of its own.
        """
        attention = getattr(old, stack.family.attn, None)
        if attention is None:
            raise ValueError("block=tokenwise: a compact block without an attention of its own stands there already")
        hidden = stack.dims.hidden
        new = copy.deepcopy(old, {id(attention): nn.Identity()})  # in its place, so that no copy of it is made
        weight = next(old.parameters())
        module = _Map(hidden if linear else 0, stack.family).to(device=weight.device, dtype=weight.dtype)
        set_submodule(new, stack.family.attn, module)
        if not linear:
            _drop_unread(new, weight, hidden)
        return new

    @staticmethod
    def fit(
        new: nn.Module, old: nn.Module, data: FitData, *, linear: bool = True, ridge: NonNegativeFloat | None = None
    ) -> None:
        """Least squares of what the attention gave on what it read, then the MLP's output projection as `slim` does."""
        family = data.stack.family
        if linear:
            _fit_map(new.get_submodule(family.attn), old, data, ridge)
        solve_down(new, family.down, down_system(new, family.down, data), ridge)


class _Map(nn.Module):
    """Answers where the host calls its attention: `W x + b`, zero at first, or zeros where it has no map."""

    hosts_layers = True  # its layer_idx is the host's cache slot

    def __init__(self, hidden: int, family: Family) -> None:
        super().__init__()
        self.map = nn.Linear(hidden, hidden) if hidden else None
        if self.map is not None:
            nn.init.zeros_(self.map.weight)
            nn.init.zeros_(self.map.bias)
        self.family = family
        self.layer_idx = 0

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Map the stream [B, T, D]; the cache counts the tokens, as hosts read its length off their first layer."""
        cache = kwargs.get(self.family.cache_key)
        if cache is None and args:
            cache = dict(zip(self.family.positional, args, strict=False)).get(self.family.cache_key)
        if cache is not None:
            CacheSlot(cache, self.layer_idx).mark(hidden_states)
        return torch.zeros_like(hidden_states) if self.map is None else self.map(hidden_states), None


@torch.no_grad()
def _fit_map(module: nn.Module, old: nn.Module, data: FitData, ridge: float | None) -> None:
    """Rows are weighted as everywhere; the map is pulled towards zero."""
    assert isinstance(module, _Map)
    assert module.map is not None
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read = args[0] if args else kwargs["hidden_states"]
        seen.append((read, output[0] if isinstance(output, tuple) else output))

    def add(part: FitData, sums: Ridge) -> None:
        for index, h, _, row_weight in part.rows():
            part.run(old, h, index)
            read, gave = seen.pop()
            sums.add(read.view(h.shape), gave.view(h.shape), row_weight)

    nn.init.zeros_(module.map.weight)
    nn.init.zeros_(module.map.bias)
    attention = old.get_submodule(data.stack.family.attn)
    handle = attention.register_forward_hook(note, with_kwargs=True)
    try:
        system = data.regression(module.map, add, own=False)
    finally:
        handle.remove()
    write(module.map, system.best(module.map, ridge).solution)


def _drop_unread(block: nn.Module, weight: Tensor, hidden: int) -> None:
    """Take out norms that nobody reads: before an attention that is gone they would be parameters that never move."""
    probe = weight.detach().new_ones(1, 2, hidden)
    norms = [(name, module) for name, module in block.named_children() if "norm" in type(module).__name__.lower()]
    parameters = [parameter for _, module in norms for parameter in module.parameters()]
    if not parameters:
        return
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            output = block(probe)
            state = output[0] if isinstance(output, tuple) else output
            found = torch.autograd.grad(state.sum(), parameters, allow_unused=True)
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
    unread = {id(p) for p, gradient in zip(parameters, found, strict=True) if gradient is None}
    for name, module in norms:
        if all(id(parameter) in unread for parameter in module.parameters()):
            set_submodule(block, name, nn.Identity())

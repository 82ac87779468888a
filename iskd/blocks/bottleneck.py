"""The published compact block: a whole small transformer between a down- and an up-projection.

    h + up(inner(relu(down(norm(h)))))

Source: ISKD (Musaeus and van der Goot, COLING 2025, 2025.coling-main.440) and its code; `inner` is a decoder of the
host's own family with `layers` layers of width D / reduction, own positions and a final norm. Ours adds three things,
each of which
can be switched off for the published form: an RMS norm before the down-projection (`norm`), a zero up-projection at
init so that the edit starts as removal and not as noise (`zero_up`), and KV caching.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from iskd.blocks.base import FitData
from iskd.blocks.choosing import write
from iskd.blocks.ridge import Ridge
from iskd.blocks.small_decoder import InnerCache, run_decoder, small_decoder
from iskd.models import CacheSlot, Stack
from iskd.models.families import Dims


class Bottleneck(nn.Module):
    """Down-projection, ReLU, small decoder, up-projection, residual; causal by the host's own mask.

    What for bottleneck_paper: the same as published: no norm, noise for an up-projection, no fit
    Source: ISKD (COLING 2025, 2025.coling-main.440); norm, zero up-projection and fit are ours
    Source for bottleneck_paper: ISKD (COLING 2025, 2025.coling-main.440) and its code
    Needs: calibration tokens (`run.fit_tokens`); widths that `block.reduction` divides
    Needs for bottleneck_paper: healing: it starts worse than removal; widths that `block.reduction` divides
    Costs: `layers` blocks of width D / `reduction` and their cache; 18.3 % of a block of SmolLM2-135M, 97 s for eight
        fits (experiments/warm-start/README.md)
    Costs for bottleneck_paper: `layers` blocks of width D / `reduction` and their cache; 18.3 % of a block of
        SmolLM2-135M (experiments/warm-start/README.md)
    Measured: KL 1.33, 30 % of the block parameters out, not fitted, distilled at once
        (experiments/iskd-smollm2/README.md); KL 0.764 right after the fit, eight blocks
        (experiments/warm-start/README.md)
    Measured for bottleneck_paper: KL 3.54, 30 % of the block parameters out, healed on labels
        (experiments/iskd-smollm2/README.md); KL 1.538 unhealed, eight blocks (experiments/warm-start/README.md)
    """

    adds: ClassVar[str] = "up"

    def __init__(self, inner: nn.Module, stack: Stack, dims: Dims, *, norm: bool, zero_up: bool) -> None:
        super().__init__()
        hidden = stack.dims.hidden
        self.norm = nn.RMSNorm(hidden, eps=1e-6, elementwise_affine=False) if norm else nn.Identity()
        self.down = nn.Linear(hidden, dims.hidden)
        self.inner = inner
        self.up = nn.Linear(dims.hidden, hidden)
        self.family, self.kv_heads = stack.family, dims.kv_heads
        for projection in (self.down, self.up):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        if zero_up:
            nn.init.zeros_(self.up.weight)

    @classmethod
    def from_block(
        cls,
        old: nn.Module,
        stack: Stack,
        *,
        reduction: PositiveInt = 4,
        layers: PositiveInt = 2,
        heads: PositiveInt | None = None,
        norm: bool = True,
        zero_up: bool = True,
        fit_steps: NonNegativeInt = 60,
        ridge: NonNegativeFloat | None = None,
    ) -> Bottleneck:
        """A fresh block; sizes follow the host divided by `reduction`.

        `heads` sets the query heads (default: the host's divided likewise); `fit_steps` and `ridge` are used by `fit`.
        Raises ValueError when a size does not divide.
        """
        if not 1 <= layers <= 64:
            raise ValueError(f"block.layers must be between 1 and 64, got {layers}; block=linear has no inner layers")
        return cls(
            small_decoder(stack.config, type(stack.base), dims := inner_dims(stack, reduction, heads), layers),
            stack,
            dims,
            norm=norm,
            zero_up=zero_up,
        )

    @staticmethod
    def fit(
        new: nn.Module, old: nn.Module, data: FitData, *, fit_steps: int = 60, ridge: float | None = None, **_: object
    ) -> None:
        """Warm start, then a closed form.

        `fit_steps` Adam steps (3e-3, linear decay) on the relative squared error of the block's output; then the
        up-projection is re-solved by least squares on the features reached.
        """
        block = new.get_submodule("block")
        assert isinstance(block, Bottleneck)
        # a generator of its own: a fit draws the same on every rank and moves nobody's random numbers
        generator = torch.Generator(block.up.weight.device).manual_seed(0)
        nn.init.xavier_uniform_(block.up.weight, gain=0.1, generator=generator)
        optimizer = torch.optim.Adam(new.parameters(), lr=3e-3)
        with torch.enable_grad():
            for step in range(fit_steps):
                index, h, target, weight = data.row(step % len(data.inputs))
                for group in optimizer.param_groups:
                    group["lr"] = 3e-3 * (1 - step / fit_steps)
                error = ((data.run(new, h, index) - target).float() * weight).square().sum(-1).mean()
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
        optimizer.zero_grad()
        block._solve_up(new, data, ridge)

    @torch.no_grad()
    def _solve_up(self, hosted: nn.Module, data: FitData, ridge: float | None) -> None:
        features: list[Tensor] = []

        def add(part: FitData, sums: Ridge) -> None:
            for index, h, _, weight in part.rows():
                part.run(hosted, h, index)
                sums.add(features.pop(), torch.cat([goal - h for goal in part.goals(index)], dim=-1), weight)

        handle = self.up.register_forward_pre_hook(lambda _module, args: features.append(args[0]))
        try:
            system = data.regression(self.up, add)
        finally:
            handle.remove()
        write(self.up, system.best(self.up, ridge).solution)

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CacheSlot | None = None,
    ) -> Tensor:
        """Run the block on the stream [B, T, D]; `mask` is the host's own (None = plain causal)."""
        inner_cache = None if cache is None else InnerCache(cache, self.kv_heads)
        x = torch.relu(self.down(self.norm(h_BTD)))
        x = run_decoder(self.inner, self.family, x, mask, positions, inner_cache)
        if inner_cache is not None:
            inner_cache.flush()
        return h_BTD + self.up(x)


def inner_dims(stack: Stack, reduction: int, heads: int | None) -> Dims:
    """Sizes of the inner decoder: widths divided by `reduction`, as many key-value heads as query heads."""
    host = stack.dims
    if reduction < 1 or host.hidden % reduction:
        raise ValueError(f"block.reduction={reduction} does not divide the stream width {host.hidden}")
    width = host.hidden // reduction
    heads = heads or max(1, host.heads // reduction)
    explicit = getattr(stack.config, "head_dim", None)
    head_dim = int(explicit) if explicit else width // heads
    if not explicit and width % heads:
        raise ValueError(f"block.heads={heads} does not divide the inner width {width}; choose one of its divisors")
    if stack.family.rotary and head_dim % 2:
        raise ValueError(f"block.heads={heads} gives heads of width {head_dim}; rotary positions need an even width")
    mlp = 4 * width if host.mlp == 4 * host.hidden else max(1, host.mlp // reduction)
    return Dims(hidden=width, heads=heads, kv_heads=heads, head_dim=head_dim, mlp=mlp)

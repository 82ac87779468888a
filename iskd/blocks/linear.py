"""One linear map on the normalised stream: `h + W (h / rms(h)) + b`.

The map is fitted by ridge least squares to what the replaced block added. On the raw stream such a map is worse than
removing the block (the attention-sink position, with a norm of thousands, gets an output of its own size);
normalising its input is what makes it work. No token mixing, no KV cache.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from iskd.blocks.base import FitData
from iskd.blocks.ridge import Ridge
from iskd.models import CacheSlot, Stack


class Linear(nn.Module):
    """Residual linear block over a stream of width `hidden`; identity at init.

    Source: ours; least squares as in ReplaceMe (arXiv 2505.02819), here on the normalised stream
    Needs: calibration tokens (`run.fit_tokens`)
    Costs: one D x D matrix and a bias, no token mixing, no cache; 9.4 % of a block of SmolLM2-135M, 31 s for eight fits
        (experiments/warm-start/README.md)
    Measured: KL 0.700 right after the fit, eight blocks (experiments/warm-start/README.md)
    """

    adds: ClassVar[str] = "map"

    def __init__(self, hidden: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.map = nn.Linear(hidden, hidden)
        self.eps = eps
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    @classmethod
    def from_block(cls, old: nn.Module, stack: Stack, ridge: NonNegativeFloat = 1e-2) -> Linear:
        """A zero map; `ridge` is used by `fit`."""
        if ridge <= 0:
            raise ValueError(f"block.ridge must be positive, got {ridge}")
        return cls(stack.dims.hidden)

    @staticmethod
    def fit(new: nn.Module, old: nn.Module, data: FitData, ridge: NonNegativeFloat = 1e-2) -> None:
        """Least squares of (teacher's output - student's stream) on the normalised stream, in closed form."""
        block = new.get_submodule("block")
        assert isinstance(block, Linear)
        weight, bias = block.map.weight, block.map.bias
        system = Ridge(weight.shape[1], weight.shape[0], bias=True, device=weight.device)
        with torch.no_grad():
            for _, h, target, row_weight in data.rows():
                system.add(block.normalise(h), target - h, row_weight)
            solved, solved_bias = system.solve(torch.zeros_like(weight), torch.zeros_like(bias), ridge)
            assert solved_bias is not None
            weight.copy_(solved)
            bias.copy_(solved_bias)

    def normalise(self, h_BTD: Tensor) -> Tensor:
        """The stream divided by its root mean square over D, in float32."""
        h = h_BTD.float()
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CacheSlot | None = None,
    ) -> Tensor:
        """Map the stream [B, T, D]; positions do not mix."""
        if cache is not None:
            cache.mark(h_BTD)
        return h_BTD + self.map(self.normalise(h_BTD).to(h_BTD.dtype)).to(h_BTD.dtype)

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
from iskd.blocks.choosing import write
from iskd.blocks.ridge import Ridge
from iskd.models import CacheSlot, Stack


class Linear(nn.Module):
    """Residual linear block over a stream of width `hidden`; identity at init.

    Source: ours; least squares as in ReplaceMe (arXiv 2505.02819), here on the normalised stream
    Needs: calibration tokens (`run.fit_tokens`)
    Costs: one D x D matrix and a bias, no token mixing, no cache; 9.4 % of a block of SmolLM2-135M, 81 s for eight fits
        (experiments/warm-start/README.md)
    Measured: KL 0.660 right after the fit, eight blocks (experiments/warm-start/README.md)
    """

    adds: ClassVar[str] = "map"

    def __init__(self, hidden: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.map = nn.Linear(hidden, hidden)
        self.eps = eps
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    @classmethod
    def from_block(cls, old: nn.Module, stack: Stack, ridge: NonNegativeFloat | None = None) -> Linear:
        """A zero map; `ridge` is used by `fit`."""
        if ridge is not None and ridge <= 0:
            raise ValueError(f"block.ridge must be positive, got {ridge}")
        return cls(stack.dims.hidden)

    @staticmethod
    @torch.no_grad()
    def fit(new: nn.Module, old: nn.Module, data: FitData, ridge: NonNegativeFloat | None = None) -> None:
        """Least squares of what the student's stream lacks on the normalised stream, in closed form."""
        block = new.get_submodule("block")
        assert isinstance(block, Linear)

        def add(part: FitData, sums: Ridge) -> None:
            for index, h, _, row_weight in part.rows():
                sums.add(block.normalise(h), torch.cat([goal - h for goal in part.goals(index)], dim=-1), row_weight)

        nn.init.zeros_(block.map.weight)
        nn.init.zeros_(block.map.bias)
        write(block.map, data.regression(block.map, add).best(block.map, ridge).solution)

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

"""The block that does nothing: `h -> h`. Replacing by it gives exactly the logits of removal, at full depth."""

from __future__ import annotations

from torch import Tensor, nn

from iskd.models import CacheSlot, Stack


class Identity(nn.Module):
    """Passes the stream [B, T, D] through; 0 parameters.

    Source: none: removal without renumbering, the lower bound
    Needs: nothing
    Costs: nothing
    Measured: KL 1.163, eight blocks, unhealed (experiments/warm-start/README.md)
    """

    @classmethod
    def from_block(cls, old: nn.Module, stack: Stack) -> Identity:
        """Nothing to inherit."""
        return cls()

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CacheSlot | None = None,
    ) -> Tensor:
        """Return `h_BTD`."""
        if cache is not None:
            cache.mark(h_BTD)
        return h_BTD

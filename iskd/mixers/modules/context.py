"""What a mixer knows about its tokens beside the stream: padding, places, documents, and what a cache has left."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.mixers.modules.layers import ShortConv
from iskd.models.hosting import kept


@dataclass
class Context:
    """What a mixer knows about its tokens beside the stream; made anew for every pass.

    Attributes:
        seen: tokens that are real and not padding, bool [B, T]; None = all.
        positions: of the tokens in their documents, [B, T] or [1, T].
        segments: document number of every token [B, T]; None = one document. A real token whose position does not
            grow starts a new one. The first real token goes on with the document of the cache.
        past: last inputs of the windows (`window`) before the first token, in the order of the calls.
        last: the same after the last token.
        cached: whether a cache goes on from these tokens.
    """

    seen: Tensor | None
    positions: Tensor
    segments: Tensor | None = None
    past: list[Tensor] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)
    cached: bool = False

    @classmethod
    def of(cls, x_BTD: Tensor, mask: Tensor | None, positions: Tensor | None, past: tuple[Tensor, ...] = ()) -> Context:
        """Read the host's mask and positions; without positions the tokens are one document from its start."""
        tokens = x_BTD.shape[1]
        seen = kept(mask, tokens)
        if positions is None:
            return cls(seen, torch.arange(tokens, device=x_BTD.device).unsqueeze(0), past=list(past))
        starts = positions[:, 1:] <= positions[:, :-1]
        if seen is not None:
            # padding has positions of its own; the first real token goes on like the first token
            starts = starts & seen[:, 1:] & (seen.cumsum(1)[:, :-1] > 0)
        segments = None
        # almost always there is one document, and the core is faster without segments; a graph (torch.export,
        # torch.compile) holds for all inputs, so there nobody looks
        if tokens > 1 and (torch.compiler.is_compiling() or bool(starts.any())):
            segments = F.pad(starts.long().cumsum(1), (1, 0)).expand(x_BTD.shape[0], -1)
        return cls(seen, positions, segments, list(past))

    def window(self, x_BTC: Tensor, size: int) -> list[Tensor]:
        """The inputs of `size - 1`, ..., 1 and 0 tokens ago, each [B, T, C]; zero before a document and for padding.

        The last `size - 1` inputs go into the cache, so call it equally often, in the same order, in every pass.
        """
        if self.seen is not None:
            x_BTC = x_BTC * self.seen[..., None]
        index, tokens = len(self.last), x_BTC.shape[1]
        before = self.past[index] if self.past else x_BTC.new_zeros(x_BTC.shape[0], size - 1, x_BTC.shape[2])
        row = torch.cat([before.to(x_BTC.dtype), x_BTC], dim=1)
        shifted = [row[:, start : start + tokens] for start in range(size)]
        last = row[:, tokens:]
        if self.segments is not None:
            # inputs from the cache belong to the first token's document
            number = F.pad(self.segments, (size - 1, 0))
            shifted = [
                inputs * (number[:, start : start + tokens] == self.segments)[..., None]
                for start, inputs in enumerate(shifted)
            ]
            last = last * (number[:, tokens:] == number[:, -1:])[..., None]
        self.last.append(last)
        return shifted

    def conv(self, conv: ShortConv, x_BTC: Tensor) -> Tensor:
        """A short convolution over the document's inputs."""
        y_BTC: Tensor = conv(self.window(x_BTC, conv.size))
        return y_BTC

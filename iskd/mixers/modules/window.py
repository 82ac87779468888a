"""The tokens that softmax in a window sees: keys and values of the window, and the sinks of every document.

Sinks are the first s real tokens of a document. All its later tokens see them (arXiv 2309.17453), and no window and no
state holds them too. A cache keeps both for its document: the last w tokens and the first s, whatever its length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iskd.mixers.modules.context import Context
from iskd.mixers.modules.limits import MAX_TOKENS, check_count
from iskd.mixers.ops.window import Sinks, near, places, running_maximum


def check_window(window: int, sinks: int) -> None:
    """Raise ValueError for a window out of its range, or sinks that it is too short for."""
    check_count("window", window, 1, MAX_TOKENS)
    check_count("sinks", sinks, 0, MAX_TOKENS)
    if sinks > window:
        raise ValueError(
            f"mixer.sinks={sinks} is more than mixer.window={window}: sinks are a few first tokens beside the window; "
            f"set mixer.sinks to {window} or less, or widen the window"
        )


@dataclass(frozen=True)
class Window:
    """Keys and values in reach of some tokens, and of what documents they are.

    Attributes:
        k, v: of the w tokens before the first and of the T tokens [B, w + T, G, ...].
        number: their documents [B, w + T]; -1 for padding and sinks.
        segments: the T tokens' documents [B, T].
        sinks: those of the documents; None = there are none.
    """

    k: Tensor
    v: Tensor
    number: Tensor
    segments: Tensor
    sinks: Sinks | None

    @classmethod
    def read(cls, context: Context, k_BTGK: Tensor, v_BTGV: Tensor, *, size: int, sinks: int) -> Window:
        """Put what the cache has left before the tokens, and leave there what the next tokens will need.

        In the cache: keys [B, w, G, K], values [B, w, G, V] and which of them count [B, w]; with sinks the same three
        for them, [B, s, ...].
        """
        tokens, segments = k_BTGK.shape[1], segments_of(context, k_BTGK)
        seen, place = seen_of(context, k_BTGK), len(context.last)
        k, v, counted = (_row(x, context, size) for x in (k_BTGK, v_BTGV, seen.to(k_BTGK.dtype)))
        # the window's tokens of the cache go on in the first token's document
        number = torch.cat([segments[:, :1].expand(-1, size), segments], dim=1).masked_fill(counted == 0, -1)
        found = None
        if sinks:
            found = _sinks(context, k_BTGK, v_BTGV, seen, segments, sinks)
            own = seen & (found.places < sinks)
            number = torch.cat([number[:, :size], number[:, size:].masked_fill(own, -1)], dim=1)
        context.last[place + 2] = (number[:, tokens:] == segments[:, -1:]).to(counted.dtype)
        return cls(k, v, number, segments, found)

    def softmax(self, q_BTHK: Tensor, *, reach: int, size: int, softcap: float | None = None) -> Tensor:
        """Unnormalised softmax of the last `reach` tokens and the sinks, [B, T, H, V + 1] as `near` returns it.

        Args:
            q_BTHK: queries, scaled, in the wide dtype.
            reach: tokens that are seen, at most w.
            size: most queries per block; changes the speed, not the result.
            softcap: of the scores, as of `capped`.
        """
        cut, wide = self._before - reach, q_BTHK.dtype
        sinks = self.sinks
        if sinks is not None:
            sinks = Sinks(sinks.k.to(wide), sinks.v.to(wide), sinks.places)
        k, v = self.k[:, cut:].to(wide), self.v[:, cut:].to(wide)
        return near(q_BTHK, k, v, self.number[:, cut:], self.segments, size=size, sinks=sinks, softcap=softcap)

    def behind(self, reach: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and whether they count of the token that leaves the reach of each of the T tokens."""
        cut, tokens = self._before - reach, self.segments.shape[1]
        late = slice(cut, cut + tokens)
        return self.k[:, late], self.v[:, late], self.number[:, late] == self.segments

    @property
    def _before(self) -> int:
        return self.k.shape[1] - self.segments.shape[1]


def segments_of(context: Context, x_BT: Tensor) -> Tensor:
    """Document number of every token [B, T], zeros if there is one document."""
    if context.segments is not None:
        return context.segments
    return torch.zeros(x_BT.shape[:2], dtype=torch.long, device=x_BT.device)


def seen_of(context: Context, x_BT: Tensor) -> Tensor:
    """Which tokens are real and not padding, bool [B, T]."""
    if context.seen is not None:
        return context.seen
    return torch.ones(x_BT.shape[:2], dtype=torch.bool, device=x_BT.device)


def _row(x: Tensor, context: Context, size: int) -> Tensor:
    """The window before the first token and the tokens, [B, w + T, ...]; the last w go into the cache."""
    row = torch.cat([_past(x, context, size), x], dim=1)
    context.last.append(row[:, x.shape[1] :])
    return row


def _past(x: Tensor, context: Context, size: int) -> Tensor:
    """What the cache has kept of earlier x in its next place [B, size, ...]; zeros where there is no cache."""
    if context.past:
        return context.past[len(context.last)].to(x.dtype)
    return x.new_zeros(len(x), size, *x.shape[2:])


def _sinks(context: Context, k: Tensor, v: Tensor, seen: Tensor, segments: Tensor, count: int) -> Sinks:
    """The sinks of every token's document; those of the last one go into the cache."""
    first = len(context.last)
    held = (context.past[first + 2] > 0).sum(1) if context.past else None  # half precision counts to 256
    at = places(seen, segments, held)
    slots = torch.arange(count, device=k.device)
    # where sink j of a token's document is found: in the cache, or in the row behind it; the latest one is its own
    is_sink = seen[..., None] & (at[..., None] == slots)
    spot = torch.arange(k.shape[1], device=k.device)[:, None] + count
    where = running_maximum(torch.where(is_sink, spot, slots))  # [B, T, s]
    # the last token knows where all are; with one document in the row every token does
    shared = where[:, -1:]
    found: list[Tensor] = []
    for x in (k, v):
        row = torch.cat([_past(x, context, count), x], dim=1)
        context.last.append(_taken(row, shared).squeeze(1))
        found.append(_taken(row, shared if context.segments is None else where))
    context.last.append((at[:, -1:] >= slots).to(k.dtype))
    return Sinks(found[0], found[1], at)


def _taken(row: Tensor, where_BTs: Tensor) -> Tensor:
    """The tokens of a row [B, S, ...] at some places [B, T, s]."""
    batch = torch.arange(len(row), device=row.device)[:, None, None]
    return row[batch, where_BTs]

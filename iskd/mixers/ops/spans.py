"""Decayed causal attention inside a span: every query with every earlier key, weighed by the decays between the two.

    P_ij = q_i^T diag(a_{j+1} ... a_i) k_j        j <= i

With b the running sum of log a the weight is exp(b_i - b_j). Taken apart, exp(b_i) exp(-b_j), it overflows at strong
decays; taken as it is, it needs a tensor [P, P, K] and loses digits where b is large. So no logs are summed here. Two
neighbouring spans are joined by one product of the later queries, decayed since the border, with the earlier keys,
decayed up to the border; from single tokens on, spans are joined until one is left. Decays are only multiplied, all are
at most 1, nothing is divided: nothing overflows, in value or gradient, and a decay of exactly zero is fine. (The two
levels of chunks of GLA, arXiv 2312.06635, section 4.3, are this idea with one border per 16 tokens.)

Sizes: P tokens, R queries per key, K key width, X any leading sizes.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to here spans grow token by token, then two by two: single tokens are too little work for a matrix product.
LEAF = 8
# The axis of tokens in each tensor of a span; the one before it numbers the spans.
TOKENS = (-3, -3, -2, -2)


class Span(NamedTuple):
    """P neighbouring tokens: all that other spans, and the state, need to know of them."""

    pairs_XPRP: Tensor  # row i, column j: query i times key j times the decays after j up to i; 0 for j > i
    rows_XPRK: Tensor  # queries times the decays from the span's first token up to theirs
    keys_XPK: Tensor  # keys times the decays after theirs up to the span's last token
    through_X1K: Tensor  # product of all decays; its K may be 1


def meet(rows_XPRK: Tensor, keys_XPK: Tensor, decay: Tensor | None) -> Span:
    """All P tokens as one span; decay [X, P, 1 or K], X may be 1 where heads share it; None = no decay."""
    if decay is not None and decay.shape[-1] > 1:
        return _grow(rows_XPRK, keys_XPK, decay)
    pairs = (rows_XPRK.flatten(-3, -2) @ keys_XPK.mT).unflatten(-2, rows_XPRK.shape[-3:-1])
    if decay is None:
        causal = pairs.new_ones(pairs.shape[-1], pairs.shape[-1]).tril()[:, None]
        return Span(pairs * causal, rows_XPRK, keys_XPK, keys_XPK.new_ones(*keys_XPK.shape[:-2], 1, 1))
    ones = torch.ones_like(decay)  # queries and keys of 1: what meets is the decays alone
    weights = _grow(ones.unsqueeze(-2), ones, decay)
    return Span(pairs * weights[0], rows_XPRK * weights[1], keys_XPK * weights[2], weights[3])


def _grow(rows_XPRK: Tensor, keys_XPK: Tensor, decay_XPK: Tensor) -> Span:
    """Join single tokens to spans of at most LEAF, then neighbours two by two, until one span is left."""
    tokens = keys_XPK.shape[-2]
    doublings = (-(-tokens // LEAF) - 1).bit_length()
    leaf = -(-tokens // 2**doublings)
    fill = (leaf << doublings) - tokens
    rows = F.pad(rows_XPRK, (0, 0, 0, 0, 0, fill)).unflatten(-3, (-1, leaf))
    keys = F.pad(keys_XPK, (0, 0, 0, fill)).unflatten(-2, (-1, leaf))
    decay = F.pad(decay_XPK, (0, 0, 0, fill), value=1.0).unflatten(-2, (-1, leaf))
    pairs = (rows * keys.unsqueeze(-2)).sum(-1, keepdim=True)
    singles = (pairs, rows * decay.unsqueeze(-2), keys, decay)
    by_token = zip(*(x.split(1, axis) for x, axis in zip(singles, TOKENS, strict=True)), strict=True)
    span = reduce(_join, (Span(*single) for single in by_token))
    for _ in range(doublings):
        halves = (x.unflatten(axis - 1, (-1, 2)).unbind(axis - 1) for x, axis in zip(span, TOKENS, strict=True))
        span = _join(*(Span(*half) for half in zip(*halves, strict=True)))
    pairs, rows, keys, through = (x.squeeze(axis - 1) for x, axis in zip(span, TOKENS, strict=True))
    return Span(pairs[..., :tokens, :, :tokens], rows[..., :tokens, :, :], keys[..., :tokens, :], through)


def _join(one: Span, other: Span) -> Span:
    """Two neighbours as one span. Nothing is divided and no exponent is formed: all decays multiplied are at most 1."""
    across = (other.rows_XPRK.flatten(-3, -2) @ one.keys_XPK.mT).unflatten(-2, other.rows_XPRK.shape[-3:-1])
    upper = F.pad(one.pairs_XPRP, (0, other.keys_XPK.shape[-2]))
    return Span(
        torch.cat([upper, torch.cat([across, other.pairs_XPRP], -1)], -3),
        torch.cat([one.rows_XPRK, other.rows_XPRK * one.through_X1K.unsqueeze(-2)], -3),
        torch.cat([one.keys_XPK * other.through_X1K, other.keys_XPK], -2),
        one.through_X1K * other.through_X1K,
    )

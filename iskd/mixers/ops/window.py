"""Softmax over a sliding window, without its normaliser: what is divided, and by what, is left to the mixer.

Sinks are the first tokens of a document, which all its later tokens go on to see (arXiv 2309.17453, section 3.2).

Sizes: B sequences, T tokens, G key heads, H = G * R query heads, K key width, V value width, w tokens in the window, s
sinks; in blocks, N of C queries, each with the C + w keys of its block and of the window before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Sinks(NamedTuple):
    """The sinks of every query's document."""

    k: Tensor  # [B, T or 1, s, G, K]; 1 where all queries of a row share theirs
    v: Tensor  # [B, T or 1, s, G, V]
    places: Tensor  # place of every query in its document [B, T]; sink j is seen from place j on


def near(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    keys_BS: Tensor,
    queries_BT: Tensor,
    *,
    size: int,
    sinks: Sinks | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Sums over every token's window and sinks with weights exp(score - c), c its largest score; linear in T.

    Args:
        q_BTHK: queries, scaled.
        k_BSGK: keys of the S = w + T tokens from w before the first query to the last.
        v_BSGV: their values.
        keys_BS: their document; at least 0, or -1 for those that nobody may see in a window, sinks among them.
        queries_BT: the queries' document.
        size: most queries per block; changes the speed, not the result.
        sinks: what is seen beside the window.
        softcap: as of `capped`.

    Returns:
        Of the values, then, in a last column, of the weights: [B, T, H, V + 1]; zeros where a query sees nothing.
    """
    tokens, groups, window = q_BTHK.shape[1], k_BSGK.shape[2], k_BSGK.shape[1] - q_BTHK.shape[1]
    size = min(size, tokens)
    fill, step = -tokens % size, size + window

    def blocks(x_BT: Tensor, value: float = 0.0) -> Tensor:
        """[B, N, C, ...] of [B, T, ...]."""
        return F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, fill), value=value).unflatten(1, (-1, size))

    q = blocks(q_BTHK).unflatten(3, (groups, -1))
    k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)).unfold(1, step, size) for x in (k_BSGK, v_BSGV))
    scores = capped(torch.einsum("bncgrk,bngkj->bngrcj", q, k), softcap)
    keys = F.pad(keys_BS, (0, fill), value=-1).unfold(1, step, size)[:, :, None]
    queries = blocks(queries_BT)[..., None]
    # query i of a block finds itself at place i + w
    ahead = torch.arange(step, device=q.device) - torch.arange(size, device=q.device)[:, None]
    allowed = (keys == queries) & (ahead > 0) & (ahead <= window)
    v = F.pad(v, (0, 0, 0, 1), value=1.0)
    if sinks is None:
        weights = unnormalised(scores, allowed[:, :, None, None])
        return torch.einsum("bngrcj,bngvj->bncgrv", weights, v).flatten(3, 4).flatten(1, 2)[:, :tokens]
    # one softmax for both: the sinks' columns first
    s = sinks.k.shape[2]
    first_k, first_v = (x.unsqueeze(2) if x.shape[1] == 1 else blocks(x) for x in sinks[:2])
    there = blocks(sinks.places, -1)[..., None] >= torch.arange(s, device=q.device)
    scores = torch.cat([capped(torch.einsum("bncgrk,bncjgk->bngrcj", q, first_k), softcap), scores], -1)
    allowed = torch.cat([there, allowed], -1)
    weights = unnormalised(scores, allowed[:, :, None, None])
    o = torch.einsum("bngrcj,bngvj->bncgrv", weights[..., s:], v)
    o = o + torch.einsum("bngrcj,bncjgv->bncgrv", weights[..., :s], F.pad(first_v, (0, 1), value=1.0))
    return o.flatten(3, 4).flatten(1, 2)[:, :tokens]


def places(seen_BT: Tensor, segments_BT: Tensor, before_B: Tensor | None = None) -> Tensor:
    """Place of every token in its document, from 0, real tokens counted alone [B, T]; padding has the place before it.

    Args:
        seen_BT: which tokens are real and not padding.
        segments_BT: number of the document that a token belongs to, not decreasing within a row.
        before_B: real tokens of the first document that came earlier; None = none.
    """
    seen = seen_BT.long()
    count = seen.cumsum(1)
    begins = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
    # what was counted before the document began goes off; a running maximum carries it along
    found = count - running_maximum((count - seen).masked_fill(~begins, 0)) - 1
    if before_B is None:
        return found
    return found + before_B[:, None] * (segments_BT == segments_BT[:, :1])


def running_maximum(x_BT: Tensor) -> Tensor:
    """The largest of every row's values so far [B, T, ...], integers; in steps that double, as ONNX has no `cummax`."""
    shift, tokens = 1, x_BT.shape[1]
    while shift < tokens:
        x_BT = torch.cat([x_BT[:, :shift], torch.maximum(x_BT[:, shift:], x_BT[:, :-shift])], 1)
        shift *= 2
    return x_BT


def pairs(q_BTHK: Tensor, k_BTGK: Tensor) -> Tensor:
    """q^T k of every query with every key of its group [B, H, T, T]."""
    q = q_BTHK.unflatten(2, (k_BTGK.shape[2], -1))
    return torch.einsum("btgrk,bsgk->bgrts", q, k_BTGK).flatten(1, 2)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores of softmax held within +-softcap by tanh (Gemma 2, arXiv 2408.00118, section 2); None = as they are."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def unnormalised(scores: Tensor, allowed: Tensor) -> Tensor:
    """exp(score - the row's largest), 0 where not allowed; a row that may see nothing is zero."""
    scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores - scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)).exp()

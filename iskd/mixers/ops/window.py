"""Softmax over a sliding window, without its normaliser: what is divided, and by what, is left to the mixer.

Sizes: B sequences, T tokens, G key heads, H = G * R query heads, K key width, V value width, w tokens in the window; in
blocks, N of C queries, each with the C + w keys of its block and of the window before it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def near(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, keys_BS: Tensor, queries_BT: Tensor, *, size: int) -> Tensor:
    """Sums over every token's window with weights exp(score - c), c its largest score; linear in T.

    Args:
        q_BTHK: queries, scaled.
        k_BSGK: keys of the S = w + T tokens from w before the first query to the last.
        v_BSGV: their values.
        keys_BS: their document; at least 0, or -1 for those that nobody may see.
        queries_BT: the queries' document.
        size: most queries per block; changes the speed, not the result.

    Returns:
        Of the values, then, in a last column, of the weights: [B, T, H, V + 1]; zeros where a query sees nothing.
    """
    tokens, groups, window = q_BTHK.shape[1], k_BSGK.shape[2], k_BSGK.shape[1] - q_BTHK.shape[1]
    size = min(size, tokens)
    fill, step = -tokens % size, size + window
    q = F.pad(q_BTHK, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, size)).unflatten(3, (groups, -1))
    k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)).unfold(1, step, size) for x in (k_BSGK, v_BSGV))
    scores = torch.einsum("bncgrk,bngkj->bngrcj", q, k)
    keys = F.pad(keys_BS, (0, fill), value=-1).unfold(1, step, size)[:, :, None]
    queries = F.pad(queries_BT, (0, fill)).unflatten(1, (-1, size))[..., None]
    # query i of a block finds itself at place i + w
    ahead = torch.arange(step, device=q.device) - torch.arange(size, device=q.device)[:, None]
    allowed = (keys == queries) & (ahead > 0) & (ahead <= window)
    weights = unnormalised(scores, allowed[:, :, None, None])
    o = torch.einsum("bngrcj,bngvj->bncgrv", weights, F.pad(v, (0, 0, 0, 1), value=1.0))
    return o.flatten(3, 4).flatten(1, 2)[:, :tokens]


def pairs(q_BTHK: Tensor, k_BTGK: Tensor) -> Tensor:
    """q^T k of every query with every key of its group [B, H, T, T]."""
    q = q_BTHK.unflatten(2, (k_BTGK.shape[2], -1))
    return torch.einsum("btgrk,bsgk->bgrts", q, k_BTGK).flatten(1, 2)


def unnormalised(scores: Tensor, allowed: Tensor) -> Tensor:
    """exp(score - the row's largest), 0 where not allowed; a row that may see nothing is zero."""
    scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores - scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)).exp()

"""The one recurrence behind all subquadratic mixers, three times: by chunks, by tokens, as a matrix.

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + w_t k_t v_t^T        o_t = scale * q_t^T S_t

a_t = exp(g_t) is no decay, a scalar per head or a vector over the key width (then diag(a_t), applied before the erase
read); with the delta rule w_t = beta_t, without it beta_t = 0 and w_t = 1. A bonus u reads before the write instead:
o_t = scale * q_t^T (S_{t-1} + diag(u) k_t v_t^T) (RWKV-6, arXiv 2404.05892).

The chunkwise form (arXiv 2312.06635, section 4; delta rule: arXiv 2406.06484, section 3; with decay: arXiv 2412.06464)
lets tokens meet as a causal matrix inside a chunk (`iskd.mixers.ops.spans`) and through the state across chunks. A
document that begins in the middle of a row is a decay of zero there.

Sizes: B sequences, T tokens, G key heads, H = G * R query heads (head h = g * R + r reads key head g, the order of
repeat_interleave), K key width, V value width; inside, N chunks of C tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.mixers.ops import fla
from iskd.mixers.ops.inputs import Recurrence
from iskd.mixers.ops.spans import meet


def chunk(
    given: Recurrence, *, state_BGKV: Tensor | None = None, segments_BT: Tensor | None = None, size: int = 64
) -> tuple[Tensor, Tensor]:
    """All tokens at once, in time and memory linear in T.

    Computes in float32 (float64 if an input has it) whatever autocast says. Half precision on CUDA goes to the
    kernels of fla where they serve the call (`iskd.mixers.ops.fla`).

    Args:
        given: queries, keys, values, gates.
        state_BGKV: S before the first token; None = zero.
        segments_BT: number of the document that a token belongs to, not decreasing within a row. Nothing crosses from
            one document into another; the given state belongs to the first token's.
        size: most tokens per chunk; changes the speed, not the result.

    Returns:
        Outputs [B, T, H, V] and S after the last token [B, G, K, V], both in the wide dtype.

    Raises:
        ValueError: no tokens, shapes that do not fit, a size below 1 and, on a CPU (elsewhere looking would stall the
            device), a log decay above 0 or document numbers that decrease.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 token per chunk, got {size}")
    _check(given, state_BGKV, segments_BT)
    if segments_BT is None and given.bonus is None and fla.serve(given, state_BGKV):
        return fla.chunk(given, state_BGKV)
    with torch.autocast(given.q.device.type, enabled=False):
        x = _Tokens.read(given, state_BGKV, segments_BT)
        if x.bonus is None:
            o, state = _by_chunks(x.q, x, size)
        else:
            # a bonus reads before the write: o_t = q_t S_{t-1} + (q_t u k_t) v_t. What reads S_{t-1} is the query of t
            # at the place of t - 1; the first token reads the given state, whose place is before all chunks.
            late, state = _by_chunks(x.next_queries(), x, size)
            first = torch.einsum("bgrk,bgkv->bgrv", x.q[:, 0], x.state)
            o = torch.cat([first[:, None], late[:, :-1]], 1) + x.own()[..., None] * x.v[:, :, :, None]
        return o.flatten(2, 3), state


def step(
    given: Recurrence, *, state_BGKV: Tensor | None = None, segments_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token after token, as the formula is written: the reference for `chunk`, and decoding. Arguments as there."""
    _check(given, state_BGKV, segments_BT)
    with torch.autocast(given.q.device.type, enabled=False):
        x = _Tokens.read(given, state_BGKV, segments_BT)
        state, outputs = x.state, []
        for t in range(x.q.shape[1]):
            q, k, v = x.q[:, t], x.k[:, t, :, :, None], x.v[:, t, :, None, :]  # [B,G,R,K] [B,G,K,1] [B,G,1,V]
            if x.begins is not None:
                state = state.masked_fill(x.begins[:, t, None, None, None], 0.0)
            if x.bonus is not None:
                outputs.append(q @ (state + x.bonus[..., None] * k * v))
            if x.decay is not None:
                state = state * x.decay[:, t, :, :, None]
            if x.beta is not None:
                # what the key finds is taken off the value, so that the write replaces it
                v = x.beta[:, t, :, None, None] * (v - k.mT @ state)
            state = state + k * v
            if x.bonus is None:
                outputs.append(q @ state)
        return torch.stack(outputs, 1).flatten(2, 3), state


def matrix(given: Recurrence, *, segments_BT: Tensor | None = None) -> Tensor:
    """The lower triangular M [B, H, T, T] with o = M v when the state starts at zero; arguments as in `chunk`.

    Head h meets the values of key head h // R; what they are does not matter. Quadratic in T.
    """
    given = replace(given, v=given.k[..., :0])
    _check(given, None, segments_BT)
    with torch.autocast(given.q.device.type, enabled=False):
        x = _Tokens.read(given, None, segments_BT)
        # the whole row is one chunk: B and G lead, rows [B, G, T, R, K], keys [B, G, T, K]
        rows = (x.q if x.bonus is None else x.next_queries()).transpose(1, 2)
        keys = x.k.transpose(1, 2)
        decay = x.forgetting()
        if x.beta is not None:
            rows = torch.cat([rows, keys.unsqueeze(-2)], -2)
        pairs = meet(rows, keys, None if decay is None else decay.transpose(1, 2)).pairs_XPRP
        if x.beta is not None:
            # M = pairs (I + L)^-1 diag(beta), solved from the right: no inverse is formed
            pairs, erased = _erased(pairs, x.beta.transpose(1, 2))
            flat = torch.linalg.solve_triangular(
                erased, pairs.flatten(2, 3), upper=False, left=False, unitriangular=True
            )
            pairs = flat.view_as(pairs) * x.beta.transpose(1, 2)[:, :, None, None]
        mixing = pairs.transpose(2, 3)  # [B, G, R, T, T]
        if x.bonus is not None:
            # rows were asked one token early: move them down by one, and put a token's own weight on the diagonal
            mixing = F.pad(mixing[..., :-1, :], (0, 0, 1, 0)) + torch.diag_embed(x.own().permute(0, 2, 3, 1))
        return mixing.flatten(1, 2)


@dataclass(frozen=True)
class _Tokens:
    """What one call works on, in the wide dtype; queries by key head and scaled."""

    q: Tensor  # [B, T, G, R, K]
    k: Tensor  # [B, T, G, K]
    v: Tensor  # [B, T, G, V]
    decay: Tensor | None  # a, [B, T, G, 1 or K]
    beta: Tensor | None  # [B, T, G]
    state: Tensor  # [B, G, K, V]
    begins: Tensor | None  # bool [B, T]: the first token of a document that is not the row's first
    bonus: Tensor | None  # [G, K]

    @classmethod
    def read(cls, given: Recurrence, state: Tensor | None, segments: Tensor | None) -> _Tokens:
        q, k, v, g, beta, bonus = given.q, given.k, given.v, given.g, given.beta, given.bonus
        floats = [x.dtype for x in (q, k, v, g, beta, state, bonus) if x is not None]
        # at least float32, float64 if any input has it: sums over many tokens lose what half precision cannot hold
        wide = reduce(torch.promote_types, floats, torch.float32)
        if g is not None:
            g = g.to(wide).exp()
        return cls(
            q=q.to(wide).unflatten(2, (k.shape[2], -1)) * given.scale,
            k=k.to(wide),
            v=v.to(wide),
            decay=g if g is None or g.dim() == 4 else g[..., None],
            beta=None if beta is None else beta.to(wide),
            state=k.new_zeros(len(k), *k.shape[2:], v.shape[3], dtype=wide) if state is None else state.to(wide),
            begins=None if segments is None else F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)),
            bonus=None if bonus is None else bonus.to(wide),
        )

    def forgetting(self) -> Tensor | None:
        """The decay with zeros where a document begins: [B, T, 1 or G, 1 or K]."""
        if self.begins is None:
            return self.decay
        kept = (~self.begins)[:, :, None, None].to(self.k.dtype)
        return kept if self.decay is None else self.decay * kept

    def next_queries(self) -> Tensor:
        """The queries one token earlier: what token t reads before its write is what token t - 1 leaves behind."""
        q = self.q
        if self.begins is not None:
            # a document's first token finds nothing: its query must not read the document before
            q = q.masked_fill(self.begins[:, :, None, None, None], 0.0)
        return F.pad(q[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))

    def own(self) -> Tensor:
        """Weight of a token's own value under the bonus: [B, T, G, R]."""
        assert self.bonus is not None
        return (self.q @ (self.bonus * self.k)[..., None]).squeeze(-1)


def _by_chunks(q_BTGRK: Tensor, x: _Tokens, size: int) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, G, R, V] and the last state, for these queries over the keys, values and decays of `x`."""
    tokens = q_BTGRK.shape[1]
    chunks = -(-tokens // size)
    size = -(-tokens // chunks)  # chunks of one size: little is padded
    decay, rows = x.forgetting(), _cut(q_BTGRK, size)  # rows [N, B, G, C, R, K]
    keys, values = _cut(x.k, size), _cut(x.v, size)  # [N, B, G, C, K or V]
    if x.beta is not None:
        rows = torch.cat([rows, keys.unsqueeze(-2)], -2)  # keys read as well: what they find is erased
    # inside chunks, all at once: pairs [N, B, G, C, R, C]; rows come back decayed since their chunk's start, keys up to
    # its end, so that a chunk touches the states at its two borders alone
    pairs, rows, keys, through = meet(rows, keys, None if decay is None else _cut(decay, size, fill=1.0))
    reads = None
    if x.beta is not None:
        # Written is u = beta (v - what the key finds), and it finds the state before the chunk and earlier u of the
        # chunk: (I + L) u = beta (v - found S). One triangular solve for both right sides gives u = values - reads S.
        beta = _cut(x.beta[..., None], size)
        pairs, erased = _erased(pairs, beta.squeeze(-1))
        rows, found = rows[..., :-1, :], rows[..., -1, :]  # found [N, B, G, C, K]
        right = torch.cat([values, found], -1) * beta
        solved = torch.linalg.solve_triangular(erased, right, upper=False, unitriangular=True)
        values, reads = solved.split([values.shape[-1], found.shape[-1]], -1)
    # across chunks, one after the other: the only loop, N steps of [K, V] per head
    before, values, state = _carry(keys, values, reads, through, x.state)
    # o = what the queries read of the state before their chunk + what they read inside it
    o = rows.flatten(-3, -2) @ before + pairs.flatten(-3, -2) @ values
    o = o.unflatten(-2, (size, -1)).permute(1, 0, 3, 2, 4, 5)
    return o.flatten(1, 2)[:, :tokens], state


def _carry(
    keys_NBGCK: Tensor, values_NBGCV: Tensor, reads: Tensor | None, through: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The state before every chunk [N, B, G, K, V], the values written, and the state after the last chunk.

    Args:
        keys_NBGCK: keys times the decays up to their chunk's end.
        values_NBGCV: values; with the delta rule what would be written into an empty state.
        reads: [N, B, G, C, K], the delta rule writes values - reads @ state; None = values.
        through: product of a chunk's decays, [N, B, 1 or G, 1, 1 or K].
        state: S before the first chunk.
    """
    before, written = [], []
    if reads is None:
        # what a chunk adds does not depend on the state, so all products are made ahead of the loop
        for kept, added in zip(through.mT.unbind(0), (keys_NBGCK.mT @ values_NBGCV).unbind(0), strict=True):
            before.append(state)
            state = torch.addcmul(added, kept, state)
        return torch.stack(before), values_NBGCV, state
    for kept, keys, values, read in zip(
        *(x.unbind(0) for x in (through.mT, keys_NBGCK.mT, values_NBGCV, reads)), strict=True
    ):
        before.append(state)
        written.append(values - read @ state)
        # S <- decays of the whole chunk * S + K^T U
        state = torch.addcmul(keys @ written[-1], kept, state)
    return torch.stack(before), torch.stack(written), state


def _erased(pairs_XPRP: Tensor, beta_XP: Tensor) -> tuple[Tensor, Tensor]:
    """Take the keys' row off the pairs: the queries' rows, and L of (I + L)^-1 diag(beta), valid below its diagonal."""
    return pairs_XPRP[..., :-1, :], pairs_XPRP[..., -1, :] * beta_XP[..., None]


def _cut(x_BT: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """Chunks [N, B, G, C, ...] of [B, T, G, ...]; tokens of `fill` complete the last one."""
    x = F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, -x_BT.shape[1] % size), value=fill)
    return x.unflatten(1, (-1, size)).movedim((1, 0, 3, 2), (0, 1, 2, 3)).contiguous()


def _check(given: Recurrence, state: Tensor | None, segments: Tensor | None) -> None:
    q, k, v, g = given.q, given.k, given.v, given.g
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be [B, T, H, K], k [B, T, G, K] and v [B, T, G, V], got {shapes}")
    (batch, tokens, heads, width), groups = q.shape, k.shape[2]
    if tokens == 0 or groups == 0 or heads % groups:
        raise ValueError(f"q {list(q.shape)} needs at least one token, and heads that {groups} key heads divide evenly")
    scalar = (batch, tokens, groups)
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (*scalar, width)),
        "v": (v, (*scalar, v.shape[3])),
        "g": (g, scalar if g is not None and g.dim() == 3 else (*scalar, width)),
        "beta": (given.beta, scalar),
        "state": (state, (batch, groups, width, v.shape[3])),
        "segments": (segments, (batch, tokens)),
        "bonus": (given.bonus, (groups, width)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for q {list(q.shape)} and k {list(k.shape)}, got {list(tensor.shape)}"
            )
    if torch.compiler.is_compiling():  # a graph holds for all values
        return
    if g is not None and g.device.type == "cpu" and bool((largest := g.detach().max()) > 0):
        raise ValueError(f"g must be at most 0, it is the log of a decay; its largest value is {largest.item():.3g}")
    if segments is not None and segments.device.type == "cpu" and bool((segments[:, 1:] < segments[:, :-1]).any()):
        raise ValueError("segments must not decrease along a row: number the documents in their order")

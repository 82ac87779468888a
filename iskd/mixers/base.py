"""What every mixer offers, the projections it inherits from the attention, and the recurrence over chunks.

A mixer is a class with

- `from_attention(old_attn, stack, **kwargs) -> nn.Module`: builds the mixer from the attention module it replaces,
  inheriting its projections; works on the meta device, so that a plan can count parameters without memory. Fresh
  weights may be drawn here: surgery calls it under the edit's own seed;
- `forward(x_BTD, *, mask, positions, cache) -> y_BTD`, no residual: norms, residual and MLP stay the host block's.
  `mask` is the host's; `iskd.hosting.kept` reads off it which tokens may enter the state. `cache` is a
  `iskd.hosting.CacheSlot`; a mixer keeps a state of constant size there (`state`, `keep`).

Sizes: B sequences, T tokens, D stream width, G key-value heads, R query heads of each, K key width, V value width.
Query head h = g * R + r reads key-value head g: the order of repeat_interleave and of every host.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.arch import Stack, qkv_of, weight_of


class Projections(nn.Module):
    """Copies of an attention's q, k, v and output projections, and of its q and k norms (Qwen3, Phi) if it has them.

    The copy table is that of arXiv 2504.14366; key-value heads stay grouped. Rotary positions are not inherited.
    """

    def __init__(
        self,
        qkv: tuple[nn.Linear, nn.Linear, nn.Linear],
        out: nn.Linear,
        norms: Sequence[nn.Module],
        head_dim: int,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = qkv
        self.o_proj = out
        self.q_norm, self.k_norm = norms or (nn.Identity(), nn.Identity())
        self.head_dim = head_dim
        self.kv_heads = qkv[1].out_features // head_dim

    @classmethod
    def from_attention(cls, old_attn: nn.Module, stack: Stack) -> Projections:
        """Copy what `old_attn` holds; heads are counted from its weights, so a slimmed block's attention will do."""
        family = stack.family
        inside = f"{family.attn}."
        q, k, v = (linear(weight, bias) for weight, bias in qkv_of(old_attn, stack))
        out = old_attn.get_submodule(family.out.removeprefix(inside))
        names = [path.removeprefix(inside) for path in family.qk_norms]
        norms = [copy.deepcopy(old_attn.get_submodule(name)) for name in names if hasattr(old_attn, name)]
        return cls((q, k, v), linear(weight_of(out), getattr(out, "bias", None)), norms, stack.dims.head_dim)

    def split(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, G, R, K], keys [B, T, G, K] and values [B, T, G, V] of the normalised stream."""
        groups = (self.kv_heads, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x_BTD).unflatten(-1, groups))
        k = self.k_norm(self.k_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim)))
        return q, k, self.v_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))

    def out(self, o_BTGRV: Tensor) -> Tensor:
        """Mixed values back into the stream [B, T, D]."""
        y_BTD: Tensor = self.o_proj(o_BTGRV.flatten(2))
        return y_BTD


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of a weight [out, in] and a bias [out] (None = without); draws no random numbers."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(memory_format=torch.contiguous_format))
    return layer


def recurrence(
    q_BTGRK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, state_BGKV: Tensor | None = None, *, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} + k_t v_t^T and o_t = q_t^T S_t, for all tokens, chunk by chunk.

    Inside a chunk the tokens meet as a causal matrix, across chunks through the state (the chunkwise form, e.g.
    arXiv 2312.06635, section 2.1): time and memory are linear in T.

    Args:
        q_BTGRK: queries, features already mapped.
        k_BTGK: keys, features already mapped.
        v_BTGV: values.
        state_BGKV: S before the first token; None = zero.
        chunk: tokens per chunk.

    Returns:
        Outputs [B, T, G, R, V] and S after the last token [B, G, K, V].
    """
    tokens = q_BTGRK.shape[1]
    size = min(chunk, tokens)
    # keys of zero add nothing to the state
    q, k, v = (
        F.pad(x, (0, 0) * (x.dim() - 2) + (0, -tokens % size)).unflatten(1, (-1, size))
        for x in (q_BTGRK, k_BTGK, v_BTGV)
    )
    added = torch.einsum("bnjgk,bnjgv->bngkv", k, v)
    state = torch.zeros_like(added[:, 0]) if state_BGKV is None else state_BGKV
    before = []
    for index in range(added.shape[1]):
        before.append(state)
        state = state + added[:, index]
    pairs = torch.einsum("bnigrk,bnjgk->bngrij", q, k).tril()
    o = torch.einsum("bngrij,bnjgv->bnigrv", pairs, v)
    o = o + torch.einsum("bnigrk,bngkv->bnigrv", q, torch.stack(before, dim=1))
    return o.flatten(1, 2)[:, :tokens], state

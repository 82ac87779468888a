"""A decoder of one layer inside a compact block, with a cache of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from iskd.models import CacheSlot
from iskd.models.families import Dims, Family, family_of, rotary_of


class InnerCache:
    """A cache for the layers inside one compact block.

    They share the block's single slot, stacked along the head axis: the host counts one slot per layer, and reordering
    or cropping by transformers stays right.
    """

    def __init__(self, slot: CacheSlot, kv_heads: int) -> None:
        self._slot = slot
        self._past = slot.past()
        self._heads = kv_heads
        self._new: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the inner attention layers in order; returns all keys and values of that layer."""
        assert layer_idx == len(self._new), "inner layers run once each, in order"
        self._new.append((keys, values))
        if self._past is None:
            return keys, values
        heads = slice(layer_idx * self._heads, (layer_idx + 1) * self._heads)
        return torch.cat([self._past[0][:, heads], keys], dim=-2), torch.cat([self._past[1][:, heads], values], dim=-2)

    @property
    def length(self) -> int:
        """Tokens before the new ones."""
        return 0 if self._past is None else int(self._past[0].shape[-2])

    def flush(self) -> None:
        """Write the new states of all inner layers to the host's cache."""
        keys, values = zip(*self._new, strict=True)
        self._slot.append(torch.cat(keys, dim=1), torch.cat(values, dim=1))


def small_decoder(config: PreTrainedConfig, base_class: type[nn.Module], dims: Dims, num_layers: int) -> nn.Module:
    """A fresh base model of the host's family with the given sizes and no token embedding.

    Built from a copy of the host's config, so that attention implementation, norms, rotary settings and dropout follow.
    """
    small = copy.deepcopy(config)
    family = family_of(config)
    small.num_hidden_layers = num_layers
    small.hidden_size = dims.hidden
    small.num_attention_heads = dims.heads
    setattr(small, family.mlp_size, dims.mlp)
    for key, value in (
        ("num_key_value_heads", dims.kv_heads),
        ("head_dim", dims.head_dim),
        ("word_embed_proj_dim", dims.hidden),
    ):
        if getattr(small, key, None) is not None:
            setattr(small, key, value)
    if getattr(small, "layer_types", None) is not None:
        small.layer_types = ["full_attention"] * num_layers
    if getattr(small, "no_rope_layers", None) is not None:
        small.no_rope_layers = [1] * num_layers
    if getattr(small, "query_pre_attn_scalar", None) is not None:
        small.query_pre_attn_scalar = dims.head_dim
    if getattr(small, "embedding_multiplier", None) is not None:
        small.embedding_multiplier = 1.0  # what comes in is no embedding
    # the token embedding is dropped below; one row keeps its construction cheap
    small.vocab_size, small.pad_token_id = 1, None
    inner = base_class(small)
    delattr(inner, family.embed)
    return inner


def _causal(x_BTD: Tensor, past: int) -> Tensor:
    """What is added to the scores of T new tokens over `past` and themselves [1, 1, T, past + T]: 0 = sees."""
    count = x_BTD.shape[1]
    hidden = torch.full((count, past + count), torch.finfo(x_BTD.dtype).min, dtype=x_BTD.dtype, device=x_BTD.device)
    return hidden.triu(1 + past)[None, None]


def run_decoder(
    inner: nn.Module,
    family: Family,
    x_BTD: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: InnerCache | None,
) -> Tensor:
    """Run the layers and final norm of a `small_decoder` on embeddings, with the host's own mask.

    The mask is handed to each layer as the host made it and never wrapped a second time: wrapping an additive mask
    again is what made attention uniform or non-causal in the published ISKD code (seed bug A7-1, A7-2).
    """
    if positions is None:
        positions = torch.arange(x_BTD.shape[1], device=x_BTD.device).unsqueeze(0)
    if mask is None and getattr(inner.config, "_attn_implementation", None) == "eager":
        mask = _causal(x_BTD, 0 if cache is None else cache.length)  # the others are causal without one
    h_BTD = x_BTD
    kwargs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    if family.positions is not None:
        table = inner.get_submodule(family.positions)
        h_BTD = h_BTD + (table(None, 0, position_ids=positions) if hasattr(table, "offset") else table(positions))
    if family.dropout is not None:
        h_BTD = inner.get_submodule(family.dropout)(h_BTD)
    if family.rotary is not None:
        turned = rotary_of(inner.config, "full_attention")  # type: ignore[arg-type]
        kwargs["position_embeddings"] = inner.get_submodule(family.rotary)(h_BTD, positions, *turned)
    kwargs[family.cache_key] = cache
    layers = inner.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    for layer in layers:
        h_BTD = layer(h_BTD, use_cache=cache is not None, **kwargs)
    norm = getattr(inner, family.norm, None)
    return h_BTD if norm is None else norm(h_BTD)

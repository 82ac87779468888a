"""How compact blocks and mixers live inside a host: call signature, mask, KV cache, small decoders of its family.

`HostedBlock` gives a compact block the call signature of the block it replaces and `HostedMixer` a mixer that of the
attention it replaces, so that their authors see `forward(h_BTD, *, mask, positions, cache)` only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from iskd.arch import Dims, Family, family_of


class StateLayer(DynamicLayer):
    """A layer of transformers' cache that holds a state of constant size and counts the tokens that went into it.

    Hosts read length and mask sizes off it as off any growing layer; beam search reorders the state by its first axis.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: tuple[Tensor, ...] | None = None
        self.tokens = 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.tokens

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.tokens = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError: a token cannot be taken out of a state again."""
        if tokens_to_remove:
            raise ValueError(
                f"cannot take {abs(tokens_to_remove)} tokens out of the state of a converted layer; "
                "generate without an assistant, or start with a new cache"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the states of the sequences `beam_idx`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the states of the sequences `indices`."""
        if self.state is not None:
            self.state = tuple(part[indices.to(part.device)] for part in self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence's state `repeats` times."""
        if self.state is not None:
            self.state = tuple(part.repeat_interleave(repeats, dim=0) for part in self.state)


class CacheSlot:
    """One layer's place in a KV cache, as compact blocks and mixers see it.

    A layer uses it in one way: keys and values per token (`past`, `append`), a count (`mark`), or a state of constant
    size (`state`, `keep`).
    """

    def __init__(self, cache: Any, index: int) -> None:
        self._cache = cache
        self._index = index

    def past(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values so far, each [B, H, T, K], or None before the first call."""
        layers = self._cache.layers
        if len(layers) <= self._index or not layers[self._index].get_seq_length():
            return None
        layer = layers[self._index]
        if not layer.is_croppable or getattr(layer, "is_compileable", False):
            raise ValueError(
                f"compact blocks need a growing cache, got {type(layer).__name__}; use cache_implementation='dynamic'"
            )
        return layer.keys, layer.values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the states of the new tokens, each [B, H, T_new, K]."""
        self._cache.update(keys, values, self._index)

    def mark(self, h_BTD: Tensor) -> None:
        """Count the new tokens without storing states: hosts read the cache's length off their first layer."""
        placeholder = h_BTD.new_zeros(h_BTD.shape[0], 1, h_BTD.shape[1], 1)
        self.append(placeholder, placeholder)

    def state(self) -> tuple[Tensor, ...] | None:
        """What `keep` was given last, each [B, ...], or None before the first call.

        Raises ValueError when the slot cannot hold a state or holds keys and values of another model.
        """
        layers = self._cache.layers
        layer = layers[self._index] if self._index < len(layers) else None
        if isinstance(layer, StateLayer):
            return layer.state
        if layer is not None and (getattr(layer, "is_compileable", False) or layer.get_seq_length()):
            raise ValueError(
                f"slot {self._index} of the cache is a {type(layer).__name__} and cannot take the state of a mixer; "
                "start with an empty cache and use cache_implementation='dynamic'"
            )
        return None

    def keep(self, state: tuple[Tensor, ...], *, tokens: int) -> None:
        """Replace the state by the one after `tokens` more tokens."""
        layers = self._cache.layers
        if self._index == len(layers):
            layers.append(StateLayer())
        elif not isinstance(layers[self._index], StateLayer):
            layers[self._index] = StateLayer()
        layer = layers[self._index]
        layer.state, layer.tokens = state, layer.tokens + tokens


class HostedBlock(nn.Module):
    """Runs a compact block where the host model calls one of its own blocks."""

    hosts_layers = True  # its layer_idx is the host's cache slot; layers inside are numbered on their own

    def __init__(self, block: nn.Module, family: Family) -> None:
        super().__init__()
        self.block = block
        self.family = family
        self.layer_idx = 0

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Translate the host's call and return the new stream [B, T, D]."""
        kwargs.update(zip(self.family.positional, args, strict=False))
        cache = kwargs.get(self.family.cache_key)
        out: Tensor = self.block(
            hidden_states,
            mask=kwargs.get("attention_mask"),
            positions=kwargs.get("position_ids"),
            cache=None if cache is None else CacheSlot(cache, self.layer_idx),
        )
        return out


class HostedMixer(nn.Module):
    """Runs a mixer where a block of the host calls its attention."""

    def __init__(self, mixer: nn.Module, family: Family) -> None:
        super().__init__()
        self.mixer = mixer
        self.family = family
        self.layer_idx = 0

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Translate the block's call: the mixed stream [B, T, D], and no attention weights."""
        cache = kwargs.get(self.family.cache_key)
        out: Tensor = self.mixer(
            hidden_states,
            mask=kwargs.get("attention_mask"),
            positions=kwargs.get("position_ids"),
            cache=None if cache is None else CacheSlot(cache, self.layer_idx),
        )
        return out, None


def kept(mask: Any, tokens: int) -> Tensor | None:
    """Which of the last `tokens` tokens are real and not padding, bool [B, tokens]; None = all.

    Read off a host's attention mask: a real token sees itself, padding does not; that holds under a sliding window too.

    Args:
        mask: None, [B, S] (nonzero = real), or [B, 1, tokens, S], bool (True = sees) or additive (0 = sees), where S
            counts past and new tokens.
        tokens: new tokens.

    Raises:
        ValueError: a mask of any other kind.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a mixer cannot read the attention mask {shape}; use attn_implementation='sdpa', 'eager' or "
            "'flash_attention_2'"
        )
    if mask.dim() == 2:
        return mask[:, -tokens:] != 0
    diagonal = mask[:, 0, :, -tokens:].diagonal(dim1=1, dim2=2)
    return diagonal if diagonal.dtype == torch.bool else diagonal == 0


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
        part = slice(layer_idx * self._heads, (layer_idx + 1) * self._heads)
        return torch.cat([self._past[0][:, part], keys], dim=-2), torch.cat([self._past[1][:, part], values], dim=-2)

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
    # the token embedding is dropped below; one row keeps its construction cheap
    small.vocab_size, small.pad_token_id = 1, None
    inner = base_class(small)
    delattr(inner, family.embed)
    return inner


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
    h_BTD = x_BTD
    kwargs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    if family.positions is not None:
        table = inner.get_submodule(family.positions)
        h_BTD = h_BTD + (table(None, 0, position_ids=positions) if hasattr(table, "offset") else table(positions))
    if family.dropout is not None:
        h_BTD = inner.get_submodule(family.dropout)(h_BTD)
    if family.rotary is not None:
        kwargs["position_embeddings"] = inner.get_submodule(family.rotary)(h_BTD, positions)
    kwargs[family.cache_key] = cache
    layers = inner.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    for layer in layers:
        h_BTD = layer(h_BTD, use_cache=cache is not None, **kwargs)
    norm = getattr(inner, family.norm, None)
    return h_BTD if norm is None else norm(h_BTD)

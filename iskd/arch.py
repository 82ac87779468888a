"""The one file that knows transformers' attribute paths, block signatures and cache conventions.

A model family is one `Family` descriptor. `Stack` reads a model through it; `HostedBlock` gives a compact block the
call signature of the block it replaces, so that block authors see `forward(h_BTD, *, mask, positions, cache)` only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Where the parts of a decoder family are.

    Paths of the base model start at the language model, paths of a block at the block.

    Attributes:
        base, layers, embed, norm: base model, its blocks, its token embedding, its final norm.
        qkv, out, attn: input projections, output projection and module of the attention.
        fused: how one qkv matrix packs its outputs: "" = three matrices, "thirds" = q | k | v,
            "heads" = (q, k, v) of head 0, of head 1, ...
        ups, down: projections into and out of the MLP's channels.
        mlp_size: the config's key of the MLP width.
        rotary, positions, dropout: rotary embedding, learned positions, embedding dropout (None = has none).
        cache_key, positional: the block's keyword for the KV cache; names of arguments that hosts pass by position.
    """

    base: str = "model"
    layers: str = "layers"
    embed: str = "embed_tokens"
    norm: str = "norm"
    attn: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    fused: str = ""
    ups: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_size: str = "intermediate_size"
    rotary: str | None = "rotary_emb"
    positions: str | None = None
    dropout: str | None = None
    cache_key: str = "past_key_values"
    positional: tuple[str, ...] = ()


_LLAMA_LIKE = Family()
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "phi": Family(
        norm="final_layernorm", out="self_attn.dense", ups=("mlp.fc1",), down="mlp.fc2", dropout="embed_dropout"
    ),
    "gpt2": Family(
        base="transformer",
        layers="h",
        embed="wte",
        norm="ln_f",
        attn="attn",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        fused="thirds",
        ups=("mlp.c_fc",),
        down="mlp.c_proj",
        mlp_size="n_inner",
        rotary=None,
        positions="wpe",
        dropout="drop",
        positional=("past_key_values", "attention_mask", "encoder_hidden_states"),
    ),
    "gpt_neox": Family(
        base="gpt_neox",
        embed="embed_in",
        norm="final_layer_norm",
        attn="attention",
        qkv=("attention.query_key_value",),
        out="attention.dense",
        fused="heads",
        ups=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        dropout="emb_dropout",
        cache_key="layer_past",
    ),
    "opt": Family(
        base="model.decoder",
        norm="final_layer_norm",
        out="self_attn.out_proj",
        ups=("fc1",),
        down="fc2",
        mlp_size="ffn_dim",
        rotary=None,
        positions="embed_positions",
    ),
}


@dataclass(frozen=True)
class Dims:
    """Sizes of one block: stream width, query heads, key-value heads (= groups), head width, MLP channels."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int


def family_of(config: PreTrainedConfig) -> Family:
    """The descriptor of a config's family. Raises ValueError naming the supported ones."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"model_type {config.model_type!r} has no descriptor in iskd.arch.FAMILIES; supported are {known}. "
            "A family whose blocks have the same parts needs one Family(...) entry."
        ) from None


def dims_of(config: PreTrainedConfig) -> Dims:
    """Block sizes that a config states, defaults of the family filled in."""
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    return Dims(
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        mlp=int(getattr(config, family_of(config).mlp_size, None) or 4 * hidden),
    )


class Stack:
    """One model seen as embedding, blocks, final norm and head. Holds no state of its own: reads through."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config: PreTrainedConfig = model.config
        self.family = family_of(model.config)
        self.dims = dims_of(model.config)

    @property
    def base(self) -> nn.Module:
        """The decoder without its head; called with `input_ids`, it returns the state after the final norm."""
        return self.model.get_submodule(self.family.base)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks in stack order."""
        layers = self.base.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] (or None) of the output layer."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head.weight, head.bias

    @property
    def softcap(self) -> float | None:
        """Soft cap that the model puts on its logits, if it has one."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return float(cap) if cap else None

    @property
    def context(self) -> int | None:
        """Longest sequence the model was made for, in tokens."""
        return getattr(self.config, "max_position_embeddings", None)

    def last_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """State after the final norm [B, T, D] for `input_ids` [B, T]: the head's input."""
        output: Tensor = self.base(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return output

    def finish(self, h_BTD: Tensor) -> Tensor:
        """What the host does between its last block and its head: final norm, output projection of OPT."""
        for name in (self.family.norm, "project_out"):
            module = getattr(self.base, name, None)
            if module is not None:
                h_BTD = module(h_BTD)
        return h_BTD

    def set_layers(self, blocks: list[nn.Module], kept: list[int] | None = None) -> None:
        """Put `blocks` in as the new stack and make config depth, per-layer lists and cache slots true.

        `kept` are the positions (in the present stack) that survive; needed when the depth changes.
        """
        setattr(self.base, self.family.layers, nn.ModuleList(blocks))
        if kept is not None:
            types = getattr(self.config, "layer_types", None)
            if isinstance(types, list):
                self.config.layer_types = [types[i] for i in kept]
            self.config.num_hidden_layers = len(blocks)
        for index, block in enumerate(blocks):
            set_layer_idx(block, index)


def set_layer_idx(block: nn.Module, index: int) -> None:
    """Give a block its KV-cache slot. Layers inside a hosted block keep their own numbering."""
    if isinstance(block, HostedBlock):
        block.layer_idx = index
        return
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", index)  # noqa: B010 (typed as a submodule otherwise)


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Assign the submodule at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


class CacheSlot:
    """One layer's place in a KV cache, as compact blocks see it."""

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


class HostedBlock(nn.Module):
    """Runs a compact block where the host model calls one of its own blocks."""

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

"""The families of models: where their layers are and how a block is called. A new family goes here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """Where the modules of a decoder family are.

    Paths of the base model start at the language model, paths of a block at the block.

    Attributes:
        base, layers, embed, norm: base model, its blocks, its token embedding, its final norm.
        qkv, out, attn: input projections, output projection and module of the attention.
        fused: how one qkv matrix packs its outputs: "" = three matrices, "thirds" = q | k | v of one width, "stacked" =
            q | k | v, of which k and v have the key-value heads' width, "heads" = (q, k, v) of head 0, of head 1, ...
        qk_norms: norms of queries and keys, one head wide or as wide as the projection; a model may lack them.
        reads_norms: norms stand at the entrance of attention and MLP, so that the size of the stream does not matter.
        post_norms: norms through which what `out` and `down` give passes before it is added to the stream.
        ups, down: projections into and out of the MLP's channels.
        fused_ups: outputs of each channel in one matrix of `ups`: 2 = gate | up.
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
    qk_norms: tuple[str, ...] = ()
    reads_norms: bool = True
    post_norms: tuple[str, ...] = ()
    ups: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    fused_ups: int = 1
    down: str = "mlp.down_proj"
    mlp_size: str = "intermediate_size"
    rotary: str | None = "rotary_emb"
    positions: str | None = None
    dropout: str | None = None
    cache_key: str = "past_key_values"
    positional: tuple[str, ...] = ()


_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
_SENSES = ("vision_config", "audio_config", "speech_config", "vision_tower")
_LLAMA_LIKE = Family()
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": Family(qk_norms=_QK_NORMS),
    "smollm3": _LLAMA_LIKE,
    "granite": _LLAMA_LIKE,
    "olmo2": Family(qk_norms=_QK_NORMS, reads_norms=False, post_norms=_POST_NORMS),
    "gemma": _LLAMA_LIKE,
    "gemma2": Family(post_norms=_POST_NORMS),
    "gemma3_text": Family(qk_norms=_QK_NORMS, post_norms=_POST_NORMS),
    "phi3": Family(
        qkv=("self_attn.qkv_proj",),
        fused="stacked",
        ups=("mlp.gate_up_proj",),
        fused_ups=2,
    ),
    "phi": Family(
        norm="final_layernorm",
        out="self_attn.dense",
        qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        ups=("mlp.fc1",),
        down="mlp.fc2",
        dropout="embed_dropout",
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


def rotary_of(config: PreTrainedConfig, layer_type: str | None) -> tuple[str, ...]:
    """What a rotary embedding takes beside states and positions: the layer's type, where each has its own angles."""
    rope = getattr(config, "rope_parameters", None)
    return (layer_type,) if layer_type and isinstance(rope, dict) and isinstance(rope.get(layer_type), dict) else ()


def why_never(config: Mapping[str, Any]) -> str | None:
    """Why no descriptor could make a model of a config.json one that is edited here; None = nothing speaks against it.

    Mixtures of experts are told by their keys, whatever they are called, models of pictures or sound by their parts.
    """
    experts = "a token passes a few of a layer's many MLPs, and blocks, fits and counts here are of layers with one"
    parts = [config, *(part for key in ("text_config", "ffn_config") if isinstance(part := config.get(key), dict))]
    for key, count in ((key, count) for part in parts for key, count in part.items()):
        if _EXPERTS.fullmatch(str(key)) and isinstance(count, int) and count > 1:
            return f"is a mixture of experts ({key} is {count}): {experts}"
    if "moe" in str(config.get("model_type")).lower().split("_"):
        return f"is a mixture of experts: {experts}"
    if other := next((key for key in _SENSES if isinstance(config.get(key), dict)), None):
        return (
            f"reads more than text ({other}), and here the text part alone is edited: save it as a model of its own, "
            "by the few lines in docs/tutorials/new_model.md"
        )
    return None


def family_of(config: PreTrainedConfig) -> Family:
    """The descriptor of a config's family. Raises ValueError naming the supported ones."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"model_type {config.model_type!r} has no descriptor in iskd.models.families.FAMILIES; "
            f"supported are {known}. A family whose blocks have the same modules needs one Family(...) entry."
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

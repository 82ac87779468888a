"""Tiny models, windows and specs for the tests: seeded, offline, made in milliseconds."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from iskd.data.sources import Docstrings
from iskd.models import Stack
from iskd.plan import Spec
from iskd.refits import Refit, Text, divided

CONF = Path(__file__).resolve().parents[1] / "conf"
STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260k"
NEWER = ("gemma2", "gemma3_text", "olmo2", "phi3", "smollm3", "granite")
FAMILIES = ("gpt2", "phi", "llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox", "opt", *NEWER)
BEHIND = ("gemma2", "gemma3_text", "olmo2")  # what their blocks give passes a norm before it is added
VOCAB = 101
# Sizes that divide the tiny models and fit in milliseconds; a block's yaml keeps all its other values.
SMALL = {"reduction": 3, "layers": 2, "ratio": 0.6, "fit_steps": 6}


def tiny(
    family: str,
    *,
    hidden: int = 48,
    layers: int = 4,
    heads: int = 6,
    kv_heads: int = 3,
    mlp: int = 96,
    vocab: int = VOCAB,
    context: int = 64,
    dropout: float = 0.0,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A random model of a family, in evaluation mode; `config` overrides single keys of its config.

    Token 0 pads; it is also what tests pad with.
    """
    common: dict[str, Any] = {"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    common |= {"max_position_embeddings": context, "attention_dropout": dropout, "hidden_dropout": dropout}
    rotary = {**common, "intermediate_size": mlp}
    grouped = {**rotary, "num_key_value_heads": kv_heads}
    sizes = {
        "gpt2": {
            **{key: common[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
            **{"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": context, "n_inner": mlp},
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout),
        },
        "phi": {**rotary, "embd_pdrop": dropout, "resid_pdrop": dropout},
        "gpt_neox": rotary,
        "opt": {**common, "ffn_dim": mlp, "word_embed_proj_dim": hidden, "dropout": dropout},
        "qwen3": {**grouped, "head_dim": 16},
        "gemma": {**grouped, "head_dim": 8},
        # every other layer sees few tokens, or has no positions; factors that a fresh config leaves at 1
        "gemma2": {**grouped, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 12},
        "gemma3_text": {**grouped, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 12}
        | {"sliding_window_pattern": 2},
        "phi3": {**grouped, "embd_pdrop": dropout, "resid_pdrop": dropout},
        "smollm3": {**grouped, "no_rope_layer_interval": 2},
        "granite": {**grouped, "embedding_multiplier": 4.0, "attention_multiplier": 0.25}
        | {"residual_multiplier": 0.5, "logits_scaling": 0.25},
    }.get(family, grouped)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed notes a stack for every kind of device
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **config}))
    return model.eval()


def windows(n: int = 2, t: int = 16, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """Random token windows [n, t] without the special tokens 0, 1 and 2."""
    return torch.randint(3, vocab, (n, t), generator=torch.Generator().manual_seed(seed))


def sampled(model: PreTrainedModel, n: int = 8, t: int = 64, seed: int = 0) -> Tensor:
    """Windows [n, t] of what a model says: text it has learnt, without a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = torch.full((n, 1), int(model.config.bos_token_id))
        options: dict[str, Any] = {"do_sample": True, "min_new_tokens": t - 1, "max_new_tokens": t - 1}
        return cast(Any, model).generate(first, attention_mask=torch.ones_like(first), **options)


def tiny_teacher() -> PreTrainedModel:
    """A model that has learnt something: stories260K, or without it a Llama trained on the bytes of docstrings."""
    if STORIES.is_dir():
        return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    return train_teacher()


def train_teacher(steps: int = 100) -> PreTrainedModel:
    """A Llama after `steps` AdamW steps on docstrings, in a few seconds; reads bytes, up to 128."""
    model = tiny("llama", hidden=64, heads=4, kv_heads=2, mlp=128, vocab=257, context=128, tie_word_embeddings=True)
    text = "\n\n".join(text for text, _ in Docstrings(max_documents=400).documents())
    tokens = torch.tensor(list(text.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 64, (8,), generator=generator)
        batch = torch.stack([tokens[start : start + 64] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def conf_group(group: str) -> dict[str, dict[str, Any]]:
    """Every yaml of a config group as plain values by name: a part is tested the moment its yaml exists."""
    files = sorted((CONF / group).glob("[!_]*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def block_specs(**sizes: Any) -> dict[str, Spec]:
    """The spec of every block in conf/block, its values replaced by `sizes` and by those that fit tiny models."""
    specs = {}
    for name, values in conf_group("block").items():
        target, sizes_ = values["_target_"], {**SMALL, **sizes}
        kwargs = {key: sizes_.get(key, value) for key, value in values.items() if key not in ("_target_", "defaults")}
        if "fit_steps" in inspect.signature(Spec(target).resolve().from_block).parameters:  # type: ignore[attr-defined]
            kwargs["fit_steps"] = sizes_["fit_steps"]
        specs[name] = Spec(target, kwargs)
    return specs


def mixer_specs() -> dict[str, Spec]:
    """The spec of every mixer in conf/mixer; chunks and windows are short, so that tiny texts hold several."""
    specs = {}
    for name, values in conf_group("mixer").items():
        kwargs = {key: value for key, value in values.items() if key not in ("_target_", "defaults")}
        specs[name] = Spec(values["_target_"], {**kwargs, **({"window": 4} if "window" in kwargs else {}), "chunk": 5})
    return specs


def mixer_variants() -> dict[str, Spec]:
    """Mixers of conf/mixer with keys that give them other parts or another state, each under a name of its own."""
    changed: dict[str, tuple[str, dict[str, Any]]] = {
        "t2r": ("linear_attention", {"feature_map": "t2r"}),
        "dpfp": ("linear_attention", {"feature_map": "dpfp", "nu": 2}),
        "sliding_elu1": ("sliding", {"feature_map": "elu1"}),
        "grouped": ("gated_deltanet", {"group": 4}),
        "three_steps": ("deltaproduct", {"steps": 3}),
        "three_turned": ("deltaproduct", {"steps": 3, "rotary": True, "heads": 2, "conv_activation": "silu"}),
        "bare": ("deltaproduct", {"steps": 1, "decay": False, "gate": False, "conv": 0}),
        "shifted": ("rwkv6", {"token_shift": True}),
        "turned": ("gla", {"rotary": True, "conv": 4, "conv_activation": "silu"}),
    }
    specs = mixer_specs()
    return {name: Spec(specs[mixer].target, {**specs[mixer].kwargs, **keys}) for name, (mixer, keys) in changed.items()}


@torch.no_grad()
def louder(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights and no zero biases, so that what a mixer does shows in the logits of a random model."""
    generator = torch.Generator().manual_seed(1)
    for block in Stack(model).layers:
        for parameter in block.get_submodule(Stack(model).family.attn).parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def padded(lengths: tuple[int, ...] = (16, 9)) -> tuple[Tensor, Tensor, Tensor]:
    """Windows padded on the left: ids, mask and positions, each [B, T]."""
    ids = windows(len(lengths), max(lengths), seed=3)
    mask = torch.stack([(torch.arange(ids.shape[1]) >= ids.shape[1] - length).long() for length in lengths])
    return ids * mask, mask, (mask.cumsum(1) - 1).clamp_min(0)


def digest(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def hooks(model: nn.Module) -> int:
    """Number of forward and backward hooks in a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def modes(model: nn.Module) -> list[bool]:
    """Training flag of every module."""
    return [module.training for module in model.modules()]


@torch.no_grad()
def silence(model: PreTrainedModel, position: int) -> None:
    """Make the block at `position` the identity by zeroing what it adds to the stream."""
    stack = Stack(model)
    for path in (stack.family.out, stack.family.down):
        for parameter in stack.layers[position].get_submodule(path).parameters():
            parameter.zero_()


def text_of(given: Callable[[int], Sequence[Tensor]] | Sequence[Tensor], *refits: Refit, least: int = 1) -> Text:
    """The text that some refits read in a run: windows, or what gives so many tokens of them, divided once."""
    windows = given if callable(given) else lambda _tokens: given
    return divided(windows, *(max(getattr(refit, key) for refit in refits) for key in ("tokens", "held_tokens")), least)

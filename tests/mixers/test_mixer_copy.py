"""Copying is exact: linear attention with the identity for a map is the attention it was made from, without softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from iskd.models import surgery
from iskd.plan import Convert, Record, Spec
from tests.factories import tiny

LINEAR = "iskd.mixers.linear_attention.LinearAttention"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@torch.no_grad()
def test_grouped_heads_are_copied_exactly(kv_heads: int, rotary: bool) -> None:
    """Llama's own projections, turning and repeating of key-value heads; six query heads, in float64."""
    model: Any = tiny("llama", kv_heads=kv_heads).double()
    attention, x = model.model.layers[1].self_attn, randn(2, 9, 48)
    q, k, v = (
        proj(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if rotary:
        q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, torch.arange(9)[None]))
    k, v = (repeat_kv(x, 6 // kv_heads) for x in (k, v))
    weights = (q @ k.mT / 8**0.5).tril()
    wanted = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    spec = Spec(LINEAR, {"feature_map": "identity", "normalize": False, "conv": 4, "rotary": rotary, "chunk": 4})
    surgery.apply(model, Record(4), [Convert(1, spec)])
    copied: Any = model.get_submodule("model.layers.1.self_attn.mixer")
    assert copied.kv_heads == kv_heads
    torch.testing.assert_close(copied(x), wanted, atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(copied.matrix(x), weights, atol=1e-9, rtol=1e-8)

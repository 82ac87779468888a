"""A cache that is lengthened has what one of a long prompt has: shapes, length, and a host that goes on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.models import surgery
from iskd.models.cache import StateLayer, cache_bytes, lengthen
from iskd.models.stack import Stack
from iskd.plan import Convert, Edit, Record, Replace, Spec
from tests.factories import tiny, windows

EDITS: dict[str, list[Edit]] = {
    "attention": [],
    "hybrid": [
        Replace(0, Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})),
        Replace(1, Spec("iskd.blocks.identity.Identity", {})),
        Convert(2, Spec("iskd.mixers.gla.GLA", {})),
    ],
    "converted": [Convert(layer, Spec("iskd.mixers.sliding.Sliding", {"window": 4})) for layer in range(4)],
}


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    windowed = {"sliding_window": 8}
    families = [*((family, {}) for family in ("llama", "gpt2", "opt", "gpt_neox")), ("mistral", windowed)]
    return [(family, name, more) for family, more in families for name in EDITS]


def prompted(model: PreTrainedModel, ids: Tensor) -> Any:
    return Stack(model).base(input_ids=ids, use_cache=True).past_key_values


def shapes(cache: Any) -> list[list[torch.Size]]:
    found = []
    for layer in cache.layers:
        tensors = layer.state if isinstance(layer, StateLayer) else (layer.keys, layer.values)
        found.append([tensor.shape for tensor in tensors])
    return found


@pytest.mark.parametrize(("family", "name", "more"), cases())
@torch.no_grad()
def test_a_lengthened_cache_is_as_long_and_as_large_as_that_of_a_long_prompt(
    family: str, name: str, more: dict[str, Any]
) -> None:
    model = tiny(family, **more)
    surgery.apply(model, Record(4), EDITS[name])
    ids = windows(1, 45)
    cache, whole = prompted(model, ids[:, :12]), prompted(model, ids)
    lengthen(cache, 0)
    assert cache.get_seq_length() == 12
    lengthen(cache, 33)
    assert shapes(cache) == shapes(whole)
    assert cache_bytes(cache) == cache_bytes(whole)
    for each in (cache, whole):
        assert each.get_seq_length() == 45
        logits = model(input_ids=ids[:, :1], past_key_values=each, use_cache=True).logits
        assert logits.isfinite().all()
        assert each.get_seq_length() == 46

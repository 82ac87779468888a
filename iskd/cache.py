"""A model's cache between two tokens: how many bytes it holds, and how it gets long without a long prompt.

A cache is transformers' own: keys and values of attention, states of converted layers (`iskd.hosting.StateLayer`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from iskd.hosting import StateLayer


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache: keys and values of attention, states of mixers."""
    return sum(tensor.nbytes for tensor in _tensors(cache))


def cache_held_bytes(cache: Any) -> int:
    """Bytes of the memory behind a cache's tensors: a view keeps all of what it was cut from."""
    storages = (tensor.untyped_storage() for tensor in _tensors(cache))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def lengthen(cache: Any, tokens: int) -> None:
    """Make a cache that has seen a prompt look as if `tokens` more had followed, without a pass of the model.

    Keys and values are repeated, as far as a sliding window keeps them; a state stays as it is and counts the tokens.
    What a next token costs depends on the length alone, so this stands in for a prompt that would take minutes to read;
    what such a cache makes a model say means nothing.

    Args:
        cache: of at least one token; changed in place.
        tokens: how many; 0 changes nothing.
    """
    for layer in cache.layers if tokens else ():
        if isinstance(layer, StateLayer):
            layer.tokens += tokens
        else:
            layer.update(*(_repeated(part, tokens) for part in (layer.keys, layer.values)))


def _repeated(part_BHTK: Tensor, tokens: int) -> Tensor:
    """The T tokens of keys or values over and over, `tokens` in all."""
    times = math.ceil(tokens / part_BHTK.shape[2])
    return part_BHTK.repeat(1, 1, times, 1)[:, :, :tokens]


def _tensors(cache: Any) -> Iterator[Tensor]:
    def inside(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from inside(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from inside(item)

    return inside([vars(layer) for layer in cache.layers])

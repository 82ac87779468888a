"""The KV cache: one layer's slot in it, the state of a mixer, how many bytes it holds, how it gets long.

A cache is transformers' own: keys and values of attention, states of converted layers (`iskd.models.cache.StateLayer`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache: keys and values of attention, states of mixers."""
    return sum(tensor.nbytes for tensor in _tensors(cache))


def layer_bytes(cache: Any) -> list[int]:
    """Bytes of the tensors in every slot of a cache, in the order of the stack."""
    return [sum(tensor.nbytes for tensor in _inside(vars(layer))) for layer in cache.layers]


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
            layer.update(*(_repeated(kept, tokens) for kept in (layer.keys, layer.values)))


def forked(cache: Any, sequences: Tensor) -> Any:
    """A cache of its own for each of `sequences` [B], numbers of sequences in `cache`, which is left as it is."""
    own = copy.deepcopy(cache)
    for layer in own.layers:
        layer.batch_select_indices(sequences)
    return own


def _repeated(kept_BHTK: Tensor, tokens: int) -> Tensor:
    """The T tokens of keys or values over and over, `tokens` in all."""
    times = math.ceil(tokens / kept_BHTK.shape[2])
    return kept_BHTK.repeat(1, 1, times, 1)[:, :, :tokens]


def _tensors(cache: Any) -> Iterator[Tensor]:
    return _inside([vars(layer) for layer in cache.layers])


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _inside(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _inside(item)


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
            self.state = tuple(tensor[indices.to(tensor.device)] for tensor in self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence's state `repeats` times."""
        if self.state is not None:
            self.state = tuple(tensor.repeat_interleave(repeats, dim=0) for tensor in self.state)


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

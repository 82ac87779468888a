"""Documents in packed windows: where each begins, so that none is read or continued from another (`data.boundaries`).

A separator token belongs to the document that it ends. Positions restart behind it; that is how transformers is told of
packed sequences (`find_packed_sequence_indices` in its masking_utils), and how mixers know where to empty their state.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from iskd.models.signals import IGNORE


def positions_in(input_ids: Tensor, separator: int) -> Tensor:
    """Place of every token in its own document, [B, T], for windows [B, T]; a window begins with place 0."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    firsts = torch.zeros_like(input_ids)
    firsts[:, 1:] = places[1:] * (input_ids[:, :-1] == separator)
    return places - firsts.cummax(dim=1).values


def within(labels: Tensor, input_ids: Tensor, separator: int | None) -> Tensor:
    """Labels [B, T] without the first token of the next document, which the end of the one before says nothing about.

    Args:
        labels: next token of every position of the windows.
        input_ids: the windows.
        separator: id of the token between documents; None = documents are not told apart, labels stay as they are.
    """
    return labels if separator is None else labels.masked_fill(input_ids == separator, IGNORE)


def with_successor(input_ids: Tensor, separator: int | None) -> Tensor:
    """Numbers [N] of the tokens in the flattened windows [B, T] whose next token is in the window and their document.

    Without a separator they are counted. With one the windows are looked at, which on a device waits: ask while they
    are still on the host.
    """
    if separator is None:
        numbers = torch.arange(input_ids.numel(), device=input_ids.device)
        return numbers.view_as(input_ids)[:, :-1].flatten()
    goes_on = input_ids != separator
    goes_on[:, -1] = False
    return goes_on.flatten().nonzero().squeeze(1)


_LOOK, _KNOWN = "find_packed_sequence_indices", "iskd_one_text"
_inside, _installing = threading.local(), threading.Lock()


@contextmanager
def one_text() -> Iterator[None]:
    """Inside the context, in this thread, transformers takes every window for one text without a look.

    In every pass it asks whether positions restart somewhere, and for the answer a device has to be waited for. To be
    used where it is known that they do not.
    """
    _install()
    _inside.depth = getattr(_inside, "depth", 0) + 1
    try:
        yield
    finally:
        _inside.depth -= 1


def _install() -> None:
    """Stand before transformers' question, once and for good: what one thread knows another must not believe."""
    with _installing:
        look = getattr(masking_utils, _LOOK, None)
        if look is None or hasattr(look, _KNOWN):
            return

        @wraps(look)
        def asked(*args: Any, **kwargs: Any) -> Any:
            return None if getattr(_inside, "depth", 0) else look(*args, **kwargs)

        setattr(asked, _KNOWN, True)
        setattr(masking_utils, _LOOK, asked)


def positions_of_one_text(tokens: int, device: torch.device) -> Tensor:
    """Positions [1, T] that are known not to restart (`is_one_text`), wherever this very tensor is handed on to.

    A block that is run again in the backward pass gets it too, when no context of the forward pass is left.
    """
    positions = torch.arange(tokens, device=device).unsqueeze(0)
    setattr(positions, _KNOWN, True)
    return positions


def is_one_text(positions: Tensor) -> bool:
    """Whether positions are known not to restart, without a look at them."""
    return not torch.compiler.is_compiling() and hasattr(positions, _KNOWN)

"""Documents in packed windows: where each begins, so that none is read or continued from another (`data.boundaries`).

A separator token belongs to the document that it ends. What is known of windows goes one way, as arguments of calls:

    Stack.separator       the token, kept by the model (`Stack.keep_apart`); None = a window is one text
    Stack.trunk           makes `position_ids` of the windows and calls the model with them
    transformers          masks one document from another where positions restart (`find_packed_sequence_indices`)
    HostedMixer           is called with the same positions, and a mixer empties its state where they restart

Whether they restart is only known to who looks, and to look at a device is to wait for it. So where it is known without
a look that they do not, the model is called with `one_text=True` too, which transformers hands on to blocks and mixers;
its own masks are kept from looking by `iskd.system.patches.one_text`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iskd.models.signals import IGNORE

# the argument of a model's call that says: no position of these windows restarts, nobody has to look
ONE_TEXT = "one_text"


def positions_in(input_ids: Tensor, separator: int | None) -> Tensor:
    """Place of every token in its own document, for windows [B, T]; a window begins with place 0.

    Args:
        input_ids: the windows.
        separator: id of the token that ends a document; None = a window is one text.

    Returns:
        [B, T], or [1, T] without a separator: then all windows have the same places.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    if separator is None:
        return places.unsqueeze(0)
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

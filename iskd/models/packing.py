"""Documents in packed windows: where each begins, so that none is read or continued from another (`data.boundaries`).

A separator token belongs to the document that it ends, as an end token does, or to the one that it begins, as a begin
token in front of every document does (`iskd.data.framing` says which a run has). What is known of windows goes
one way, as arguments of calls:

    Stack.separator       the token, kept by the model (`Stack.keep_apart`); None = a window is one text
    Stack.trunk           makes `position_ids` of the windows and calls the model with them
    transformers          masks one document from another where positions restart (`find_packed_sequence_indices`)
    HostedMixer           is called with the same positions, and a mixer empties its state where they restart

Whether they restart is only known to who looks, and to look at a device is to wait for it. So where it is known without
a look that they do not, the model is called with `one_text=True` too, which transformers hands on to blocks and mixers;
its own masks are kept from looking by `iskd.system.patches.one_text`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iskd.models.signals import IGNORE, next_tokens

# the argument of a model's call that says: no position of these windows restarts, nobody has to look
ONE_TEXT = "one_text"


@dataclass(frozen=True)
class Separator:
    """The token by which documents are told apart.

    Attributes:
        token: its id.
        begins: it is the first of the document behind it; else the last of the one before.
    """

    token: int
    begins: bool = False


def positions_in(input_ids: Tensor, separator: Separator | None) -> Tensor:
    """Place of every token in its own document, for windows [B, T]; a window begins with place 0.

    Args:
        input_ids: the windows.
        separator: what tells documents apart; None = a window is one text.

    Returns:
        [B, T], or [1, T] without a separator: then all windows have the same places.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    if separator is None:
        return places.unsqueeze(0)
    is_one = input_ids == separator.token
    firsts = torch.zeros_like(input_ids)
    firsts[:, 1:] = places[1:] * (is_one[:, 1:] if separator.begins else is_one[:, :-1])
    return places - firsts.cummax(dim=1).values


def within(labels: Tensor, input_ids: Tensor, separator: Separator | None) -> Tensor:
    """Labels [B, T] without the first token of the next document, which the end of the one before says nothing about.

    Args:
        labels: next token of every position of the windows.
        input_ids: the windows.
        separator: what tells documents apart; None = they are not told apart, labels stay as they are.
    """
    if separator is None:
        return labels
    return labels.masked_fill((labels if separator.begins else input_ids) == separator.token, IGNORE)


def with_successor(input_ids: Tensor, separator: Separator | None, targets: Tensor | None = None) -> Tensor:
    """Numbers [N] of the tokens in the flattened windows [B, T] whose next token is in the window and their document.

    Without separator and targets they are counted. Otherwise the windows are looked at, which on a device waits: ask
    while they are still on the host.

    Args:
        input_ids: the windows.
        separator: what tells documents apart; None = they are not told apart.
        targets: which tokens [B, T] are to be predicted (`iskd.data.chat_template`); None = all.
    """
    if separator is None and targets is None:
        numbers = torch.arange(input_ids.numel(), device=input_ids.device)
        return numbers.view_as(input_ids)[:, :-1].flatten()
    labels = within(next_tokens(input_ids, targets), input_ids, separator)
    return (labels != IGNORE).flatten().nonzero().squeeze(1)

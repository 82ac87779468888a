"""Documents in packed windows: where each begins, so that none is read or continued from another (`data.boundaries`).

A separator token belongs to the document that it ends. Positions restart behind it; that is how transformers is told of
packed sequences (`find_packed_sequence_indices` in its masking_utils), and how mixers know where to empty their state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iskd.signals import IGNORE


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

"""Work on models in the middle of a run that leaves no trace in what is trained afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from iskd.models import Stack
from iskd.training.state.random_numbers import rng_tensors, set_rng


@contextmanager
def undisturbed(*models: PreTrainedModel) -> Iterator[None]:
    """Inside, the models read a window as one text, as whoever loads them does; random numbers are put back after."""
    stacks, numbers = [Stack(model) for model in models], rng_tensors()
    separators = [stack.separator for stack in stacks]
    for stack in stacks:
        stack.keep_apart(None)
    try:
        yield
    finally:
        set_rng(numbers)
        for stack, separator in zip(stacks, separators, strict=True):
            stack.keep_apart(separator, check=False)

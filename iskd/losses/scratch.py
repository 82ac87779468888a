"""Scratch memory for the logits of a chunk: the same for every chunk of a step, and on a CPU for every step.

A fresh 256 x 49k tensor costs about five times a reused one there, because its pages come from the system one by one.
On a GPU torch's own allocator keeps them.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

# by thread: two runs in one process may be in the middle of a chunk at the same time
_held = threading.local()


def scratch(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor with arbitrary contents, of the dtype and on the device of `like`.

    On a CPU the next one of this name on this thread lies in the same memory, which is kept until a larger one is asked
    for or the thread ends: whoever asks must be done with the one before.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape)
    held: Tensor | None = getattr(_held, name, None)
    if held is None or held.dtype != like.dtype or len(held) < size:
        setattr(_held, name, None)  # the smaller one goes before the larger one comes
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=like.dtype)
        setattr(_held, name, held)
    return held[:size].view(shape)

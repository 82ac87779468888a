"""Chunk size: for how many tokens logits exist at a time, by device and free memory."""

from __future__ import annotations

from typing import Literal

import torch

Chunk = int | Literal["auto"] | None
"""Tokens per chunk; "auto" = what suits the device; None = all at once, by the naive reference loss."""

# a CPU's matmuls with a head, and the sum of its gradients over chunks, gain up to here; logits stay in its caches by
# rows anyway
_ON_CPU = 512
# bytes per token and vocabulary entry at the peak: projections of both models, and float32 log-probabilities, products
# and slopes of one or two terms
_BYTES = 40
# a GPU is busy for long enough with this much; more would only be memory
_MOST = 4 << 30
_SHARE = 4  # of the free memory, one in so many: gradients and moments may still have to come


def chunk_tokens(chunk: int | str, device: torch.device, vocabulary: int) -> int:
    """Tokens per chunk of logits.

    Args:
        chunk: their number, or "auto": 512 on a CPU; on a GPU the largest power of two whose logits and what is
            computed of them take a quarter of the memory that is free now, and 4 GiB at most. A power of two, so that a
            little more or less free memory does not change how sums are split.
        device: where the logits will be.
        vocabulary: entries of the larger of both heads.

    Raises:
        ValueError: it is neither "auto" nor a number >= 1.
    """
    if chunk == "auto":
        if device.type != "cuda":
            return _ON_CPU
        fits = min(free_bytes(device) // _SHARE, _MOST) // (_BYTES * vocabulary)
        return max(16, 1 << max(0, fits.bit_length() - 1))
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise ValueError(f"chunk={chunk!r}: choose auto, a number of tokens, or null for whole logits at once")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1 token, got {chunk}")
    return chunk


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that torch can still hand out: what nobody has, and what its allocator keeps unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused

"""The head of a model: from the last hidden states to logits, in pieces."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Head = tuple[Tensor, Tensor | None]
"""Weight [V, D] and bias [V] (or None) of the map from the last hidden state to logits."""


def say_untied(model: PreTrainedModel) -> None:
    """Set `tie_word_embeddings` to what the head is: the embedding's own tensor, or weights of its own.

    transformers loads a head that is stored beside the embedding as it is, whatever the config says, and only warns,
    and callers give a model another head; copies, resizing and exports go by the config.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    tied = head.weight is embedding.weight
    if tied != bool(getattr(model.config, "tie_word_embeddings", False)):
        has = "is the embedding" if tied else "has weights of its own"
        log.info("the head %s, so tie_word_embeddings is %s from here on, in the export too", has, str(tied).lower())
        model.config.tie_word_embeddings = tied


def at_least_fp32(x: Tensor) -> Tensor:
    """Upcast half precision to float32 and leave float32 and float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_head(head: Head) -> Head:
    """The head, detached and in the dtype that matmuls have under the active autocast, cast once for all chunks."""
    weight_VD, bias_V = head[0].detach(), None if head[1] is None else head[1].detach()
    device = weight_VD.device.type
    if not torch.is_autocast_enabled(device):
        return weight_VD, bias_V
    dtype = torch.get_autocast_dtype(device)
    return weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)


def project(hidden: Tensor, head: Head) -> Tensor:
    """Hidden states [..., D] through the head, in the head's dtype; result [..., V] in at least float32."""
    weight_VD, bias_V = head
    return at_least_fp32(F.linear(hidden.to(weight_VD.dtype), weight_VD, bias_V))


def cap_logits(projected: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """Scale (Cohere's `logit_scale`), then cap at +-softcap by tanh (Gemma 2, arXiv 2408.00118, section 2).

    Raises:
        ValueError: `softcap` is not positive.
    """
    logits = projected if scale == 1.0 else projected * scale
    if softcap is None:
        return logits
    if softcap <= 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    return torch.tanh(logits / softcap) * softcap


def cap_slope(slope: Tensor, logits: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """Backward of `cap_logits`: the slope [..., V] by logits, made in place the slope by projections."""
    if softcap is not None:
        slope.mul_(1 - (logits / softcap).square())  # d tanh(x) / dx = 1 - tanh(x)^2
    return slope if scale == 1.0 else slope.mul_(scale)

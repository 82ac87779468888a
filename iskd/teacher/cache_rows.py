"""Rows of the teacher cache, one a token: its last hidden state, or its likeliest next tokens.

    hidden   D numbers in half precision                                                      2 D bytes
    topk     k ids (2 or 4 bytes), k log-probabilities (fp16), log of the rest's mass (fp32)   4 k + 4 or 6 k + 4 bytes

A hidden state goes through the teacher's own head at every step, so that losses are the live teacher's up to the
rounding of 2^-11 (fp16) or 2^-8 (bf16). The likeliest tokens need no head and are smaller where the model is wide, but
the losses are biased (`iskd.losses.topk_kl`). Logits are stored minus their logsumexp: fp16 is finest near 0, where
probable tokens are, and the rest's mass is exact where 1 minus the rounded others would be noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from iskd.losses import Terms, traits_of
from iskd.models import Stack, at_least_fp32, autocast_head, cap_logits

KINDS = ("hidden", "topk")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_TOKENS = 256  # per chunk of logits


@dataclass(frozen=True)
class TeacherCacheSpec:
    """What is kept, and in which pieces.

    Attributes:
        kind: `hidden` or `topk`.
        top_k: tokens of `topk`.
        dtype: of `hidden`: float16, or bfloat16 for states beyond 65504.
        chunk_tokens: tokens per file.
    """

    kind: str = "hidden"
    top_k: PositiveInt = 64
    dtype: str = "float16"
    chunk_tokens: int = 1 << 18

    def __post_init__(self) -> None:
        """Check the values."""
        if self.kind not in KINDS:
            raise ValueError(f"teacher.cache={self.kind!r}: choose {' or '.join(KINDS)}, or null for no cache")
        if self.dtype not in DTYPES:
            raise ValueError(f"teacher.dtype={self.dtype!r}: choose {' or '.join(DTYPES)}")
        for key in ("top_k", "chunk_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"teacher.{key} must be at least 1, got {getattr(self, key)}")


def check_terms_cached(terms: Terms, kind: str) -> None:
    """Refuse terms that need more of the teacher than a cache of this kind holds.

    A loss on logits that still is a divergence when tokens are merged says so by `by_buckets = True`.

    Raises:
        ValueError: naming the term, what it needs, and what to do.
    """
    for name, (loss, weight) in terms.items():
        if not weight or not traits_of(loss).uses_teacher:
            continue
        inner, on_logits = "hidden" in loss.needs, "logits" in loss.needs
        if inner:
            raise ValueError(
                f"loss.{name} compares what happens inside the teacher (hidden), and teacher.cache={kind} "
                f"holds only its end: set teacher.cache=null, or leave {name} out of loss=[...]"
            )
        if kind == "topk" and not on_logits:
            raise ValueError(
                f"loss.{name} reads the teacher's last hidden state, and teacher.cache=topk holds only tokens: "
                f"set teacher.cache=hidden, or leave {name} out of loss=[...]"
            )
        temperature = traits_of(loss).temperature
        if kind == "topk" and temperature != 1.0:
            raise ValueError(
                f"loss.{name}.temperature={temperature} softens the probability of every token, and teacher.cache=topk "
                f"holds only some: set teacher.cache=hidden, or loss.{name}.temperature=1"
            )
        if kind == "topk" and not traits_of(loss).by_buckets:
            raise ValueError(
                f"loss.{name} ({type(loss).__name__}) does not say by_buckets=True, that it may see tokens merged, as "
                f"teacher.cache=topk does: set teacher.cache=hidden, or leave {name} out of loss=[...]"
            )


class RowFormat:
    """How the rows of one teacher are stored.

    Attributes:
        layout: numpy's type of one token.
        tokens: vocabulary of the teacher's head.
    """

    def __init__(self, spec: TeacherCacheSpec, stack: Stack) -> None:
        self.spec = spec
        self.tokens, width = (int(size) for size in stack.head[0].shape)
        if spec.kind == "topk" and spec.top_k >= self.tokens:
            raise ValueError(f"teacher.top_k={spec.top_k} leaves no rest of {self.tokens} tokens: use a smaller one")
        ids = "<u2" if self.tokens <= 1 << 16 else "<u4"
        fields: list[Any] = [("last_hidden", "<f2" if spec.dtype == "float16" else "<i2", (width,))]
        if spec.kind == "topk":
            fields = [("ids", ids, (spec.top_k,)), ("log_probs", "<f2", (spec.top_k,)), ("rest", "<f4")]
        self.layout: np.dtype[Any] = np.dtype(fields)

    @torch.no_grad()
    def encode(self, stack: Stack, input_ids: Tensor) -> NDArray[Any]:
        """Run the teacher on windows [B, T] on its device; rows [B, T] of `layout`.

        Raises:
            ValueError: a hidden state is not finite in half precision, or a log-probability is not.
        """
        hidden = stack.last_hidden(input_ids)
        rows: NDArray[Any] = np.empty(tuple(input_ids.shape), self.layout)
        if self.spec.kind == "topk":
            found = [self._likeliest(stack, piece) for piece in hidden.flatten(0, 1).split(_TOKENS)]
            if not all(bool(part.isfinite().all()) for piece in found for part in piece):
                raise ValueError("the teacher gives log-probabilities that are not finite: check its weights")
            for name, values in zip(("ids", "log_probs", "rest"), zip(*found, strict=True), strict=True):
                rows[name] = torch.cat(values).cpu().numpy().reshape(rows[name].shape)
            return rows
        half = hidden.to(DTYPES[self.spec.dtype])
        if not bool(torch.isfinite(half).all()):
            raise ValueError(
                f"a last hidden state of the teacher is not finite in {self.spec.dtype}: use teacher.dtype=bfloat16"
            )
        rows["last_hidden"] = (half if self.spec.dtype == "float16" else half.view(torch.int16)).cpu().numpy()
        return rows

    def _likeliest(self, stack: Stack, hidden_nD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [n, K], their log-probabilities [n, K] and that of the rest [n], finite in fp16."""
        weight, bias = autocast_head(stack.head)
        logits = at_least_fp32(F.linear(hidden_nD.to(weight.dtype), weight, bias))
        log_probs = torch.log_softmax(cap_logits(logits, scale=1.0, softcap=stack.softcap), dim=-1)
        top, ids = log_probs.topk(self.spec.top_k)
        rest = log_probs.scatter(-1, ids, float("-inf")).logsumexp(-1)
        lowest = torch.finfo(torch.float16).min
        return ids, top.clamp(min=lowest), rest.clamp(min=lowest)

    def decode(self, rows: NDArray[Any]) -> dict[str, Tensor]:
        """Rows [B, T] as tensors in memory.

        Returns:
            `last_hidden` [B, T, D] in half precision, or `ids` [B, T, K] int64 and `log_probs` [B, T, K + 1] float32,
            the rest's at the end.
        """
        if self.spec.kind == "topk":
            log_probs = np.concatenate([rows["log_probs"].astype("f4"), rows["rest"][..., None]], axis=-1)
            return {"ids": torch.from_numpy(rows["ids"].astype(np.int64)), "log_probs": torch.from_numpy(log_probs)}
        last = torch.from_numpy(np.ascontiguousarray(rows["last_hidden"]))
        return {"last_hidden": last if self.spec.dtype == "float16" else last.view(torch.bfloat16)}

"""The contract of a loss and the few helpers that the reducers and the metrics share.

A loss maps the signals of student and teacher to one value per token, in nats or mean square. It does not mask,
reduce or weight: that is done once, in `iskd.losses.chunked`, for all losses alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from iskd.models import IGNORE, Head, Signals

SIGNALS = frozenset({"logits", "hidden"})


class Loss(Protocol):
    """A loss term; lower = better, zero when the student does what is asked of it.

    What it says of itself beside `needs` are class attributes (`Traits`). One on logits that knows its own slope has
    `with_gradient(student, teacher) -> (values, d values / d student.logits)`, values of the labels' shape and a slope
    [..., V] that the caller may overwrite, which spares autograd.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Signals read: {"logits"} or {"hidden"}; empty where the last hidden state is all it reads."""

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Value per token in nats or mean square, of the labels' shape; no gradient reaches the teacher."""


Terms = Mapping[str, tuple[Loss, float]]
"""Loss and weight by the term's name, the name under which it is configured and logged."""


@dataclass(frozen=True)
class Traits:
    """What a loss may say of itself: an attribute of that name, or the value here where it has none.

    Attributes:
        uses_teacher: it reads the teacher's signals; False spares the teacher's logits.
        layers: after which a loss on hidden states reads them: numbers in the teacher, or last, all, edited, stage.
        by_buckets: it is a divergence between next-token distributions, and may see tokens merged.
        temperature: divides the logits before they are compared.
        sizes: of which states it compares the size: "stream", between blocks; "normed", behind the final norm.
    """

    uses_teacher: bool = True
    layers: str | Sequence[int] = "all"
    by_buckets: bool = False
    temperature: float = 1.0
    sizes: str = ""


def traits_of(loss: Loss) -> Traits:
    """The traits of a term."""
    return Traits(**{trait.name: getattr(loss, trait.name) for trait in fields(Traits) if hasattr(loss, trait.name)})


def of_sizes(terms: Terms, *, tied: bool) -> list[str]:
    """Names of the terms that would take a student with a larger stream for another one.

    `tied`: its head is the embedding, so that the final norm makes up for the size.
    """
    found = {name: traits_of(loss).sizes for name, (loss, _) in terms.items()}
    return [name for name, sizes in found.items() if sizes == "stream" or (tied and sizes == "normed")]


def check_terms(terms: Terms) -> None:
    """Refuse terms that cannot be added up.

    Raises:
        ValueError: There is no term, a weight is negative or not a finite number, or a term needs an unknown signal,
            or logits together with another signal (logits exist only chunk by chunk, the others only whole).
    """
    if not terms:
        raise ValueError("loss is empty: nothing would train; name at least one term, e.g. loss=[ce,kl]")
    for name, (loss, weight) in terms.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"loss.{name}.weight must be a finite number >= 0, got {weight!r}")
        unknown = loss.needs - SIGNALS
        if unknown:
            raise ValueError(f"loss.{name} needs {sorted(unknown)}; known signals are {sorted(SIGNALS)}")
        if "logits" in loss.needs and len(loss.needs) > 1:
            raise ValueError(f"loss.{name} needs {sorted(loss.needs)}; split it into a term on logits and one without")


def check_batch(
    terms: Terms, student_BTD: Tensor, teacher_BTD: Tensor | None, teacher_head: Head | None, labels_BT: Tensor
) -> None:
    """Refuse terms that do not read logits, a missing teacher and shapes that do not belong together.

    Raises:
        ValueError: As above, or as in `check_terms`.
    """
    check_terms(terms)
    others = [name for name, (loss, _) in terms.items() if "logits" not in loss.needs]
    if others:
        raise ValueError(f"loss terms {others} do not read logits; add them up with total_loss")
    readers = [name for name, (loss, _) in terms.items() if traits_of(loss).uses_teacher]
    if readers and (teacher_BTD is None or teacher_head is None):
        raise ValueError(f"loss terms {readers} use the teacher; pass its last hidden states and its head")
    for who, hidden in (("student", student_BTD), ("teacher", teacher_BTD)):
        if hidden is not None and hidden.shape[:-1] != labels_BT.shape:
            raise ValueError(f"{who} hidden states {list(hidden.shape)} do not fit labels {list(labels_BT.shape)}")


def token_values(name: str, loss: Loss, student: Signals, teacher: Signals) -> Tensor:
    """Call a term outside autocast and hold it to its contract.

    Returns:
        The term's values, of the labels' shape.

    Raises:
        ValueError: The term returned another shape, e.g. because it reduced over tokens itself.
    """
    with torch.autocast(student.labels.device.type, enabled=False):
        values = loss(student, teacher)
    _check_values(name, values, student)
    return values


def _check_values(name: str, values: Tensor, student: Signals) -> None:
    if values.shape != student.labels.shape:
        raise ValueError(
            f"loss.{name} returned shape {list(values.shape)}, expected one value per token "
            f"{list(student.labels.shape)}; leave masking and means over tokens to the framework"
        )


def knows_its_slope(loss: Loss) -> bool:
    """Whether `with_gradient` stands for this very loss: a subclass that changes only the value does not have one."""
    for cls in type(loss).__mro__:
        if "with_gradient" in vars(cls):
            return True
        if "__call__" in vars(cls):
            return False
    return False


def values_and_slope(name: str, loss: Any, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
    """Values and slope of a term that knows both, outside autocast and held to the contract as in `token_values`."""
    with torch.autocast(student.labels.device.type, enabled=False):
        values, slope = loss.with_gradient(student, teacher)
    _check_values(name, values, student)
    return values, slope


def masked_mean(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of per-token `values` where `labels` (same shape) are not ignored; looks at them, as the reference may."""
    return mean_of(values[labels != IGNORE])


def mean_of(values_N: Tensor) -> Tensor:
    """Mean over tokens; of none of them 0, with a gradient of 0 for whatever they would depend on.

    Where documents are apart or only answers count, a micro-batch may hold no label: its step goes on without it, and
    DDP waits for a gradient of every parameter all the same.
    """
    return values_N.mean() if len(values_N) else values_N.sum()


@dataclass
class BatchSignals(Signals):
    """Signals of a batch whose valid tokens are known without a look at its labels.

    Attributes:
        known: labels [B, T], and the numbers [N] of the tokens in the flattened batch whose labels are not ignored. It
            speaks of those very labels: it stands for nothing once `labels` is another tensor.
    """

    known: tuple[Tensor, Tensor] | None = None


def kept_tokens(signals: Signals) -> Tensor:
    """Numbers [N] of the tokens in the flattened batch whose labels are not ignored.

    Where they are not known beforehand (`BatchSignals`) labels are looked at, which on a GPU waits for the device.
    """
    known = signals.known if isinstance(signals, BatchSignals) else None
    if known is not None and known[0] is signals.labels:
        return known[1]
    return (signals.labels != IGNORE).flatten().nonzero().squeeze(1)


def keeping(kept_N: Tensor, tokens: int) -> Callable[[Tensor], Tensor]:
    """A function that keeps some of the B * T = `tokens` tokens of a [B, T, ...] tensor, as [N, ...]."""
    if len(kept_N) == tokens:
        return lambda x: x.flatten(0, 1)
    return lambda x: x.flatten(0, 1).index_select(0, kept_N)

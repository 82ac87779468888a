"""Divergences in buckets: the definition in value and gradient, at most the dense value, equal to it when K = V - 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iskd.losses.base import Loss, Terms, knows_its_slope
from iskd.losses.ce import CrossEntropy
from iskd.losses.chunked import total_loss
from iskd.losses.kl import KL
from iskd.losses.kl_sum import SummedKL
from iskd.losses.topk_kl import TopK, in_buckets, topk_loss
from iskd.models import IGNORE, Signals

B, T, D, V = 2, 7, 5, 23


class ByAutograd(KL):
    """The same value, its slope left to autograd."""

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        return super().__call__(student, teacher)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels() -> Tensor:
    found = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    found[:, -1], found[0, 2] = IGNORE, IGNORE
    return found


TEACHER = 2 * drawn(B, T, V, seed=1)


def likeliest(k: int) -> TopK:
    log_p = TEACHER.log_softmax(-1)
    top, ids = log_p.topk(k)
    rest = 1 - top.exp().sum(-1, keepdim=True)
    return TopK(ids, torch.cat([top, rest.log()], -1))


def by_definition(loss: KL, logits: Tensor, top: TopK) -> Tensor:
    """Mean over valid tokens of the divergence of the merged probabilities."""
    q = logits.softmax(-1).gather(-1, top.ids)
    q, p = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1), top.log_probs.exp()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = loss.beta * p + (1 - loss.beta) * q
    jsd = loss.beta * kl(p, m) + (1 - loss.beta) * kl(q, m)
    values = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": jsd}[loss.direction]
    return values[labels() != IGNORE].mean()


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


def student() -> tuple[Tensor, Tensor]:
    return drawn(B, T, D, seed=4).requires_grad_(), drawn(V, D, seed=5).requires_grad_()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", [KL, ByAutograd])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_value_and_gradient_are_those_of_the_definition(direction: str, kind: type[KL], softcap: float | None) -> None:
    loss, (hidden, weight), top = kind(direction, beta=0.3), student(), likeliest(4)
    assert knows_its_slope(loss) == (kind is KL)
    terms: Terms = {"kl": (loss, 0.7), "ce": (CrossEntropy(), 0.2)}
    for chunk in (3, 100, None):
        signals = Signals(labels(), last_hidden=hidden)
        found, means = topk_loss(terms, signals, top, (weight, None), chunk=chunk, softcap=softcap)
        logits = hidden @ weight.T
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        kl = by_definition(loss, logits, top)
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels().flatten(), ignore_index=IGNORE)
        torch.testing.assert_close(means["kl"], kl.detach())
        torch.testing.assert_close(means["ce"], ce.detach())
        torch.testing.assert_close(found, 0.7 * kl + 0.2 * ce)
        for ours, reference in zip(
            gradients(found, hidden, weight), gradients(0.7 * kl + 0.2 * ce, hidden, weight), strict=True
        ):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def dense(loss: Loss) -> Tensor:
    hidden, weight = student()
    signals = Signals(labels(), last_hidden=TEACHER)
    head = torch.eye(V, dtype=torch.float64)
    return total_loss(
        {"kl": (loss, 1.0)}, Signals(labels(), last_hidden=hidden), signals, (weight, None), (head, None)
    )[0]


def merged(loss: Loss, k: int) -> Tensor:
    hidden, weight = student()
    return topk_loss({"kl": (loss, 1.0)}, Signals(labels(), last_hidden=hidden), likeliest(k), (weight, None))[0]


@pytest.mark.parametrize("loss", [KL(), KL("reverse"), KL("jsd"), SummedKL()], ids=["kl", "reverse", "jsd", "sum"])
def test_merging_never_raises_a_divergence_and_loses_nothing_without_a_rest(loss: Loss) -> None:
    whole = dense(loss)
    values = [merged(loss, k) for k in (1, 4, 12, V - 1)]
    assert all(a <= b + 1e-12 for a, b in zip(values, [*values[1:], whole], strict=True))
    torch.testing.assert_close(values[-1], whole)
    assert values[0] < 0.9 * whole


def test_buckets_are_a_distribution() -> None:
    logits, ids = drawn(6, V), torch.tensor([[3, 0, 22]] * 6)
    log_q, within = in_buckets(logits, ids)
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(within.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(log_q[:, :3], logits.log_softmax(-1)[:, [3, 0, 22]])
    assert bool((within[:, [3, 0, 22]] == float("-inf")).all())
    assert in_buckets(logits.half(), ids)[0].dtype == torch.float32

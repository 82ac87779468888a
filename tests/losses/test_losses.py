"""Laws of the losses and of the chunked reducer; the naive reducer is the reference for values and gradients."""

from __future__ import annotations

import dataclasses
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from iskd.losses import chunk_size, chunked_vocabulary_loss, naive_vocabulary_loss, total_loss
from iskd.losses.base import BatchSignals, Loss, Terms, kept_tokens, knows_its_slope, traits_of
from iskd.losses.ce import CrossEntropy
from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.losses.kl_sum import FinalState, SummedKL
from iskd.losses.scratch import scratch
from iskd.models import IGNORE, Head, Signals

B, T, D, V = 3, 7, 8, 11
DIVERGENCES = [
    KL(),
    KL("reverse"),
    KL("jsd"),
    KL("jsd", beta=0.1),
    KL(temperature=2.0),
    KL("reverse", temperature=0.5),
    KL("jsd", temperature=3.0, beta=0.9),
]
ALL_TERMS: Terms = {"ce": (CrossEntropy(), 0.3)} | {f"kl{i}": (loss, 0.1 + i) for i, loss in enumerate(DIVERGENCES)}
CLOSED: Terms = {**ALL_TERMS, "kl_sum": (SummedKL(), 0.2)}
CONF = Path(__file__).parents[2] / "conf" / "loss"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_labels(*, ignored: bool = True) -> Tensor:
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    if ignored:
        labels[0, 4:] = IGNORE
        labels[2, ::3] = IGNORE
    return labels


class Case:
    """A student that can learn and a teacher of another width that must not."""

    def __init__(self, *, bias: bool = True, ignored: bool = True, body: bool = True, head: bool = True) -> None:
        self.hidden = rand(B, T, D, seed=2).requires_grad_(body)
        self.weight = rand(V, D, seed=3).requires_grad_(head)
        self.bias = rand(V, seed=4).requires_grad_(head) if bias else None
        self.teacher_hidden = rand(B, T, D + 2, seed=5).requires_grad_()
        self.teacher_head: Head = (rand(V, D + 2, seed=6).requires_grad_(), None)
        self.labels = some_labels(ignored=ignored)

    def inputs(self) -> tuple[Tensor, Head, Tensor, Head, Tensor]:
        return self.hidden, (self.weight, self.bias), self.teacher_hidden, self.teacher_head, self.labels

    def gradients(self) -> list[Tensor | None]:
        return [None if x is None else x.grad for x in (self.hidden, self.weight, self.bias)]


def assert_close(got: Tensor | None, expected: Tensor | None, tolerance: float = 1e-10) -> None:
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def on_logits(student: Tensor, teacher: Tensor) -> tuple[Signals, Signals]:
    labels = torch.zeros(student.shape[:-1], dtype=torch.int64)
    return Signals(labels, student), Signals(labels, teacher)


# The chunked reducer against the naive one.


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"bias": False},
        {"ignored": False},
        {"head": False},
        {"body": False},
        {"scale": 0.25},
        {"softcap": 2.0},
        {"scale": 3.0, "softcap": 5.0},
    ],
    ids=str,
)
def test_chunked_equals_naive_in_value_and_gradient(setting: dict[str, float], chunk: int) -> None:
    scale, softcap = setting.get("scale", 1.0), setting.get("softcap")
    flags = {key: bool(value) for key, value in setting.items() if key not in ("scale", "softcap")}
    fast, slow = Case(**flags), Case(**flags)
    total, means = chunked_vocabulary_loss(ALL_TERMS, *fast.inputs(), chunk=chunk, scale=scale, softcap=softcap)
    expected, expected_means = naive_vocabulary_loss(ALL_TERMS, *slow.inputs(), scale=scale, softcap=softcap)
    (total * 0.5).backward()
    (expected * 0.5).backward()
    assert_close(total, expected)
    assert list(means) == list(expected_means) == list(ALL_TERMS)
    for name, mean in means.items():
        assert_close(mean, expected_means[name])
        assert not mean.requires_grad
    for got, wanted in zip(fast.gradients(), slow.gradients(), strict=True):
        assert_close(got, wanted)
    assert fast.teacher_hidden.grad is None
    assert fast.teacher_head[0].grad is None


class Plain:
    """A term that does not know its slope."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.needs, self.uses_teacher = loss, loss.needs, traits_of(loss).uses_teacher

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        return self.loss(student, teacher)


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_slopes_equal_autograd_whatever_the_rows(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iskd.losses.chunk_walk._ROWS", rows * V)
    loss, weight = CLOSED[name]
    assert knows_its_slope(loss)
    gradients = []
    for term in (loss, Plain(loss)):
        case = Case()
        total, means = chunked_vocabulary_loss(
            {"term": (term, weight)}, *case.inputs(), chunk=5, scale=0.7, softcap=3.0
        )
        total.backward()
        gradients.append([total.detach(), means["term"], *case.gradients()])
    for closed, walked in zip(*gradients, strict=True):
        assert_close(closed, walked)


def test_slopes_at_ignored_labels_and_at_the_teacher() -> None:
    student, teacher = on_logits(rand(4, V, seed=1), rand(4, V, seed=2))
    student.labels = torch.tensor([3, IGNORE, 0, IGNORE])
    values, slope = CrossEntropy().with_gradient(student, teacher)
    assert not slope[1::2].any()
    assert not values[1::2].any()
    assert_close(slope.sum(-1), torch.zeros(4, dtype=torch.float64))
    for loss in (*DIVERGENCES, SummedKL()):
        _, at_teacher = loss.with_gradient(student, Signals(student.labels, student.logits))
        assert_close(at_teacher, torch.zeros_like(at_teacher))


def test_a_subclass_that_changes_the_value_has_no_closed_form() -> None:
    class Half(KL):
        def __call__(self, student: Signals, teacher: Signals) -> Tensor:
            return 0.5 * super().__call__(student, teacher)

    class Renamed(KL):
        pass

    assert knows_its_slope(Renamed())
    assert not knows_its_slope(Half())
    gradients = []
    for loss, weight in ((Half(), 1.0), (KL(), 0.5)):
        case = Case()
        chunked_vocabulary_loss({"kl": (loss, weight)}, *case.inputs())[0].backward()
        gradients.append(case.gradients())
    for half, whole in zip(*gradients, strict=True):
        assert_close(half, whole)


def test_gradcheck_of_the_chunked_reducer() -> None:
    case = Case()
    assert case.bias is not None
    terms: Terms = {"ce": (CrossEntropy(), 0.3), "jsd": (KL("jsd", temperature=2.0, beta=0.3), 2.0)}

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        teacher = case.teacher_hidden, case.teacher_head, case.labels
        return chunked_vocabulary_loss(terms, hidden, (weight, bias), *teacher, chunk=4)[0]

    assert torch.autograd.gradcheck(total, (case.hidden, case.weight, case.bias), fast_mode=True)


def test_tied_weight_collects_gradients_of_embedding_and_head() -> None:
    def gradient(chunked: bool) -> Tensor:
        case = Case(bias=False)
        tied = nn.Parameter(rand(V, D, seed=7))
        ids = case.labels.clamp_min(0)
        reducer = chunked_vocabulary_loss if chunked else naive_vocabulary_loss
        hidden = torch.tanh(nn.functional.embedding(ids, tied))
        teacher = case.teacher_hidden, case.teacher_head, case.labels
        total, _ = reducer(ALL_TERMS, hidden, (tied, None), *teacher, chunk=4)
        total.backward()
        assert tied.grad is not None
        return tied.grad

    assert_close(gradient(chunked=True), gradient(chunked=False))


def test_backward_twice_gives_the_same_gradient_twice() -> None:
    case = Case()
    total, _ = chunked_vocabulary_loss(ALL_TERMS, *case.inputs(), chunk=4)
    first = torch.autograd.grad(total, case.weight, retain_graph=True)[0]
    assert_close(torch.autograd.grad(total, case.weight)[0], first)


def test_a_graph_that_was_not_kept_is_not_differentiated_again() -> None:
    total, _ = chunked_vocabulary_loss(ALL_TERMS, *(case := Case()).inputs(), chunk=4)
    torch.autograd.grad(total, case.weight)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(total, case.weight)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_kl_in_closed_form_keeps_its_digits_under_large_logits(temperature: float) -> None:
    """A constant added to all logits changes no distribution; what is nearly the teacher has a KL of nearly 0."""
    loss, teacher = KL(temperature=temperature), rand(3, 50, seed=1).float()
    student = teacher + 1e-3 * rand(3, 50, seed=2).float()
    expected, slope = loss.with_gradient(*on_logits(student.double(), teacher.double()))
    for shift in (0.0, 30.0, 100.0):
        found, own_slope = loss.with_gradient(*on_logits(student + shift, teacher - 2 * shift))
        # float32 has 2^-22 for logarithms of probabilities near 2, and 2^-17 for logits near 100
        torch.testing.assert_close(found, expected.float(), atol=1e-6 if not shift else 3e-5, rtol=0)
        torch.testing.assert_close(own_slope, slope.float(), atol=1e-7 if not shift else 1e-5, rtol=0)
        assert bool((loss.with_gradient(*on_logits(teacher + shift, teacher + shift))[0] == 0).all())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_chunked_loss_is_that_of_liger_where_it_is_installed(beta: float) -> None:
    """Liger's jensen-shannon at beta 0 is the forward KL; at 0.5 both mixtures are the same."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    fused = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    ours, theirs = Case(bias=False, ignored=False), Case(bias=False, ignored=False)
    kl = KL("jsd", beta=beta) if beta else KL()
    total, _ = chunked_vocabulary_loss({"kl": (kl, 1.0)}, *ours.inputs(), chunk=4)
    hidden = (x.flatten(0, 1) for x in (theirs.hidden, theirs.teacher_hidden.detach()))
    weights = (theirs.weight, theirs.teacher_head[0].detach())
    (student, teacher), (own, other) = hidden, weights
    other_total = fused(student, own, teacher, other, theirs.labels.flatten())
    for loss in (total, other_total):
        loss.backward()
    assert_close(other_total.detach().double(), total.detach(), 1e-5)
    assert_close(theirs.hidden.grad, ours.hidden.grad, 1e-5)
    assert_close(theirs.weight.grad, ours.weight.grad, 1e-5)


def test_no_grad_gives_the_same_value_without_a_graph() -> None:
    case = Case()
    total, _ = chunked_vocabulary_loss(ALL_TERMS, *case.inputs())
    with torch.no_grad():
        silent, _ = chunked_vocabulary_loss(ALL_TERMS, *case.inputs())
    assert_close(silent, total.detach())
    assert not silent.requires_grad


def test_never_more_than_a_chunk_of_logits() -> None:
    seen: list[int] = []

    class Spy(KL):
        def __call__(self, student: Signals, teacher: Signals) -> Tensor:
            assert student.logits is not None
            seen.append(len(student.logits))
            return super().__call__(student, teacher)

    case = Case()
    chunked_vocabulary_loss({"kl": (Spy(), 1.0)}, *case.inputs(), chunk=4)
    tokens = int((case.labels != IGNORE).sum())
    assert max(seen) <= 4
    assert sum(seen) == tokens


def test_teacher_is_not_projected_when_no_term_uses_it() -> None:
    case = Case()
    poisoned = torch.full_like(case.teacher_hidden, torch.nan)
    terms: Terms = {"ce": (CrossEntropy(), 1.0)}
    head = (case.weight, case.bias)
    alone, _ = chunked_vocabulary_loss(terms, case.hidden, head, None, None, case.labels)
    beside, _ = chunked_vocabulary_loss(terms, case.hidden, head, poisoned, case.teacher_head, case.labels)
    assert_close(alone, beside)
    logits = nn.functional.linear(case.hidden, *head)
    assert_close(alone, nn.functional.cross_entropy(logits.flatten(0, 1), case.labels.flatten()))


def test_autocast_gives_low_precision_matmuls_and_full_precision_gradients() -> None:
    case = Case()
    head = (case.weight.detach().float().requires_grad_(), case.bias)
    hidden = case.hidden.detach().float().requires_grad_()
    bias = rand(V, seed=4).float().requires_grad_()
    teacher = case.teacher_hidden.detach().bfloat16(), (case.teacher_head[0].detach().bfloat16(), None)
    seen: list[torch.dtype] = []

    class Spy(KL):
        def __call__(self, student: Signals, teacher: Signals) -> Tensor:
            assert student.logits is not None
            seen.append(student.logits.dtype)
            assert not torch.is_autocast_enabled("cpu")
            assert torch.equal(student.logits, student.logits.bfloat16().float())
            return super().__call__(student, teacher)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms: Terms = {"kl": (Spy(), 1.0)}
        total, _ = chunked_vocabulary_loss(terms, hidden, (head[0], bias), *teacher, case.labels, chunk=4)
    total.backward()
    expected, _ = naive_vocabulary_loss({"kl": (KL(), 1.0)}, *case.inputs())
    expected.backward()
    assert set(seen) == {torch.float32}
    assert total.dtype == torch.float32
    for got, wanted in zip((hidden, head[0], bias), case.gradients(), strict=True):
        assert got.grad is not None
        assert wanted is not None
        assert got.grad.dtype == torch.float32
        assert (got.grad - wanted).norm() < 0.05 * wanted.norm()


def test_half_precision_head_gets_half_precision_gradients() -> None:
    case = Case(bias=False)
    hidden = case.hidden.detach().bfloat16().requires_grad_()
    weight = case.weight.detach().bfloat16().requires_grad_()
    total, _ = chunked_vocabulary_loss({"ce": (CrossEntropy(), 1.0)}, hidden, (weight, None), None, None, case.labels)
    total.backward()
    assert total.dtype == torch.float32
    for x in (hidden, weight):
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16


# Memory and the device.


def test_chunks_of_all_steps_lie_in_the_same_memory() -> None:
    where: dict[str, set[int]] = {"student": set(), "teacher": set()}

    class Spy(KL):
        def __call__(self, student: Signals, teacher: Signals) -> Tensor:
            assert student.logits is not None
            assert teacher.logits is not None
            where["student"].add(student.logits.data_ptr())
            where["teacher"].add(teacher.logits.data_ptr())
            return super().__call__(student, teacher)

    for _ in range(2):
        chunked_vocabulary_loss({"kl": (Spy(), 1.0)}, *Case().inputs(), chunk=4)
    assert [len(places) for places in where.values()] == [1, 1]
    assert where["student"] != where["teacher"]


def test_scratch_grows_and_every_thread_has_its_own() -> None:
    like, found = torch.empty(0, dtype=torch.float64), []
    first = scratch("test", (2, 3), like)
    assert scratch("test", (3, 2), like).data_ptr() == first.data_ptr()
    assert scratch("other", (2, 3), like).data_ptr() != first.data_ptr()
    thread = threading.Thread(target=lambda: found.append(scratch("test", (2, 3), like)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != first.data_ptr()
    assert scratch("test", (4, 3), like).shape == (4, 3)
    assert scratch("test", (2, 3), like.float()).dtype == torch.float32


def test_the_loss_under_inference_mode_leaves_nothing_that_training_cannot_use() -> None:
    def work() -> None:
        case = Case()
        with torch.inference_mode():
            silent, _ = chunked_vocabulary_loss(ALL_TERMS, *Case().inputs())
        total, _ = chunked_vocabulary_loss(ALL_TERMS, *case.inputs())
        total.backward()
        found.append((silent, total.detach()))

    found: list[tuple[Tensor, Tensor]] = []
    thread = threading.Thread(target=work)  # scratch of its own
    thread.start()
    thread.join()
    assert_close(*found[0])


def test_an_automatic_chunk_follows_the_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, size, found = torch.device("cuda"), 49152, []
    assert chunk_size.chunk_tokens("auto", torch.device("cpu"), size) == 512
    for free in (1 << 10, 1 << 30, 5 << 30, 20 << 30, 120 << 30):
        monkeypatch.setattr(chunk_size, "free_bytes", lambda _, free=free: free)
        found.append(chunk_size.chunk_tokens("auto", gpu, size))
        assert found[-1] == 16 or 40 * size * found[-1] <= min(free / 4, 4 << 30)
    assert found == [16, 128, 512, 2048, 2048]
    for wrong in ("many", True, 2.5):
        with pytest.raises(ValueError, match=r"chunk=.*: choose auto, a number of tokens, or null"):
            chunk_size.chunk_tokens(wrong, gpu, size)  # type: ignore[arg-type]


def test_known_tokens_are_not_looked_for_and_speak_of_their_labels_alone() -> None:
    labels = some_labels()
    kept = (labels != IGNORE).flatten().nonzero().squeeze(1)
    signals = BatchSignals(labels, known=(labels, kept))
    assert kept_tokens(signals) is kept
    signals.labels = labels.masked_fill(labels == labels.max(), IGNORE)
    fewer = kept_tokens(signals)
    assert torch.equal(fewer, kept_tokens(Signals(signals.labels)))
    assert len(fewer) < len(kept)
    assert torch.equal(kept_tokens(dataclasses.replace(signals, labels=labels.clone())), kept)


class NoQuestions(TorchDispatchMode):
    """Refuses every operation after which the host waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense), str(func)
        return func(*args, **(kwargs or {}))


def test_with_known_tokens_the_host_asks_the_device_for_nothing() -> None:
    """What a CPU is asked by `CrossEntropy.with_gradient`, a GPU is not: here its slope is autograd's."""
    case, labels = Case(), some_labels()
    kept = kept_tokens(Signals(labels))
    terms: Terms = {**CLOSED, "ce": (Plain(CrossEntropy()), 0.3), "final": (FinalState(), 1.0), "x": (HiddenMatch(), 1)}
    student = BatchSignals(labels, last_hidden=case.hidden, hidden={1: case.hidden}, known=(labels, kept))
    target = case.teacher_hidden.detach()[..., :D]
    teacher = Signals(labels, last_hidden=target, hidden={1: target})
    heads = (case.weight, case.bias), (case.teacher_head[0].detach()[:, :D], None)
    expected, _ = total_loss(terms, student, teacher, *heads, chunk=4)
    for closed in (True, False):
        chosen = {name: term for name, term in terms.items() if not closed or name != "ce"}
        with NoQuestions():
            total, _ = total_loss(chosen, student, teacher, *heads, chunk=4)
            total.backward()
    assert_close(total, expected)
    with pytest.raises(AssertionError, match="nonzero"), NoQuestions():
        total_loss(terms, Signals(labels, last_hidden=case.hidden), teacher, *heads)


# Invariances of the mean over tokens.


@pytest.mark.parametrize("reducer", [chunked_vocabulary_loss, naive_vocabulary_loss])
def test_padding_changes_nothing(reducer: type) -> None:
    case, padded = Case(), Case()
    total, _ = reducer(ALL_TERMS, *case.inputs())
    wide = torch.cat([padded.hidden, rand(B, 5, D, seed=8) * 100], dim=1)
    wide_teacher = torch.cat([padded.teacher_hidden, rand(B, 5, D + 2, seed=9) * 100], dim=1)
    labels = torch.cat([padded.labels, torch.full((B, 5), IGNORE)], dim=1)
    head = (padded.weight, padded.bias)
    more, _ = reducer(ALL_TERMS, wide, head, wide_teacher, padded.teacher_head, labels)
    total.backward()
    more.backward()
    assert_close(more, total)
    for got, wanted in zip(padded.gradients(), case.gradients(), strict=True):
        assert_close(got, wanted)


def test_micro_batches_weighted_by_tokens_add_up_to_the_batch() -> None:
    case, split = Case(), Case()
    chunked_vocabulary_loss(ALL_TERMS, *case.inputs())[0].backward()
    hidden, head, teacher, teacher_head, labels = split.inputs()
    tokens = int((labels != IGNORE).sum())
    for row in range(B):
        at = slice(row, row + 1)
        total, _ = chunked_vocabulary_loss(ALL_TERMS, hidden[at], head, teacher[at], teacher_head, labels[at])
        (total * (int((labels[at] != IGNORE).sum()) / tokens)).backward()
    for got, wanted in zip(split.gradients(), case.gradients(), strict=True):
        assert_close(got, wanted)


# Laws of the terms on logits.


@pytest.mark.parametrize("loss", [SummedKL(), *DIVERGENCES])
def test_divergence_and_its_gradient_vanish_at_the_teacher(loss: KL) -> None:
    teacher = rand(B, T, V)
    student = teacher.clone().requires_grad_()
    values = loss(*on_logits(student, teacher))
    assert_close(values.detach(), torch.zeros(B, T, dtype=torch.float64), 1e-12)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert_close(gradient, torch.zeros_like(gradient), 1e-12)


@pytest.mark.parametrize("loss", [SummedKL(), *DIVERGENCES])
def test_divergence_is_positive_ignores_shifts_and_spares_the_teacher(loss: KL) -> None:
    student, teacher = rand(B, T, V).requires_grad_(), rand(B, T, V, seed=1).requires_grad_()
    values = loss(*on_logits(student, teacher))
    assert values.shape == (B, T)
    assert bool((values > 0).all())
    assert_close(loss(*on_logits(student + 5.0, teacher - 3.0)), values)
    values.sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_closed_form_on_two_tokens() -> None:
    p, q = 0.8, 0.3
    student, teacher = torch.tensor([[math.log(q), math.log1p(-q)]]), torch.tensor([[math.log(p), math.log1p(-p)]])

    def kl(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    m = 0.25 * p + 0.75 * q
    signals = on_logits(student.double(), teacher.double())
    assert KL()(*signals).item() == pytest.approx(kl(p, q))
    assert KL("reverse")(*signals).item() == pytest.approx(kl(q, p))
    assert KL("jsd", beta=0.25)(*signals).item() == pytest.approx(0.25 * kl(p, m) + 0.75 * kl(q, m))
    assert CrossEntropy()(*signals).item() == pytest.approx(-math.log(q))


def test_forward_reverse_and_jsd_are_related_as_defined() -> None:
    a, b = rand(B, T, V), rand(B, T, V, seed=1)
    assert not torch.allclose(KL()(*on_logits(a, b)), KL("reverse")(*on_logits(a, b)))
    assert_close(KL()(*on_logits(a, b)), KL("reverse")(*on_logits(b, a)))
    assert_close(KL("jsd")(*on_logits(a, b)), KL("jsd")(*on_logits(b, a)))
    assert bool((KL("jsd")(*on_logits(9 * a, 9 * b)) <= math.log(2)).all())
    small = 1e-6
    assert_close(KL("jsd", beta=small)(*on_logits(a, b)) / small, KL()(*on_logits(a, b)), 1e-3)


def test_temperature_softens_and_keeps_the_size_of_the_gradient() -> None:
    student, teacher = rand(B, T, V), rand(B, T, V, seed=1)
    assert_close(KL(temperature=2.0)(*on_logits(student, teacher)), 4 * KL()(*on_logits(student / 2, teacher / 2)))
    # As the temperature grows the loss tends to V/2 times the variance of the logits' difference over V^2.
    limit = 0.5 * (student - teacher).var(-1, unbiased=False)
    assert_close(KL(temperature=1e4)(*on_logits(student, teacher)), limit, 1e-3)


def test_cross_entropy_is_zero_at_ignored_labels() -> None:
    labels = some_labels()
    values = CrossEntropy()(Signals(labels, rand(B, T, V)), Signals(labels))
    assert bool((values[labels == IGNORE] == 0).all())
    assert bool((values[labels != IGNORE] > 0).all())


@pytest.mark.parametrize("loss", [CrossEntropy(), SummedKL(), *DIVERGENCES])
def test_half_precision_logits_are_computed_in_fp32(loss: Loss) -> None:
    student, teacher = rand(B, T, V).bfloat16(), rand(B, T, V, seed=1).bfloat16()
    values = loss(*on_logits(student, teacher))
    assert values.dtype == torch.float32
    assert_close(values, loss(*on_logits(student.float(), teacher.float())))


# The published loss of ILD: sums over tokens.


@pytest.mark.parametrize("reducer", [chunked_vocabulary_loss, naive_vocabulary_loss])
def test_summed_kl_is_the_published_sum_at_the_batch_it_names(reducer: type) -> None:
    case, slow = Case(ignored=False), Case(ignored=False)
    total, _ = reducer({"kl_sum": (SummedKL(batch_size=B, seq_len=T), 1.0)}, *case.inputs(), chunk=4)
    student = nn.functional.linear(slow.hidden, slow.weight, slow.bias).log_softmax(-1)
    teacher = nn.functional.linear(slow.teacher_hidden, *slow.teacher_head).softmax(-1).detach()
    published = nn.functional.kl_div(student, teacher, reduction="sum") / 100
    total.backward()
    published.backward()
    assert_close(total, published)
    for got, wanted in zip(case.gradients(), slow.gradients(), strict=True):
        assert_close(got, wanted)


def test_summed_kl_is_the_mean_times_a_constant_whatever_the_batch() -> None:
    signals = on_logits(rand(B, T, V), rand(B, T, V, seed=1))
    assert_close(SummedKL()(*signals), 40.96 * KL()(*signals))
    assert_close(SummedKL(batch_size=4, divisor=50.0)(*signals), 4 * SummedKL()(*signals))


def test_the_final_state_is_the_one_after_the_norm() -> None:
    s, t = rand(B, T, D).requires_grad_(), rand(B, T, D, seed=1).requires_grad_()
    labels, loss = some_labels(), FinalState()
    values = loss(Signals(labels, last_hidden=s), Signals(labels, last_hidden=t))
    assert_close(values, (s - t).square().mean(-1))
    assert_close(loss(Signals(labels, last_hidden=s), Signals(labels, last_hidden=s)), torch.zeros_like(values))
    values.sum().backward()
    assert s.grad is not None
    assert t.grad is None
    case = Case()
    last = case.teacher_hidden[..., :D]
    student, teacher = Signals(case.labels, last_hidden=case.hidden), Signals(case.labels, last_hidden=last)
    total, means = total_loss({"final": (loss, 2.0)}, student, teacher, (case.weight, None), None)
    assert_close(total, 2 * (case.hidden - last).square().mean(-1)[case.labels != IGNORE].mean())
    assert_close(total.detach(), 2 * means["final"])
    with pytest.raises(ValueError, match="FinalState needs last_hidden"):
        loss(Signals(labels), Signals(labels))
    with pytest.raises(ValueError, match="FinalState needs equal shapes"):
        loss(Signals(labels, last_hidden=s), Signals(labels, last_hidden=s[..., 1:]))


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"seq_len": 0}, {"divisor": 0.0}, {"divisor": math.nan}])
def test_bad_summed_kl_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="SummedKL needs batch_size"):
        SummedKL(**arguments)  # type: ignore[arg-type]


# Laws of the terms on hidden states.

KINDS = ["mse", "normalized", "cosine"]


def on_hidden(student: dict[int, Tensor], teacher: dict[int, Tensor]) -> tuple[Signals, Signals]:
    labels = some_labels()
    return Signals(labels, hidden=student), Signals(labels, hidden=teacher)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_match_is_zero_on_equal_states_and_spares_the_teacher(kind: str) -> None:
    loss, state, teacher = HiddenMatch(kind), rand(B, T, D), rand(B, T, D, seed=1).requires_grad_()
    assert_close(loss(*on_hidden({4: state}, {4: state.clone()})), torch.zeros(B, T, dtype=torch.float64), 1e-12)
    student = state.requires_grad_()
    values = loss(*on_hidden({4: student}, {4: teacher}))
    assert values.shape == (B, T)
    assert bool((values > 0).all())
    values.sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_hidden_match_under_scaling() -> None:
    s, t = rand(B, T, D), rand(B, T, D, seed=1)
    pairs = {kind: (HiddenMatch(kind)(*on_hidden({0: s}, {0: t})), HiddenMatch(kind)) for kind in KINDS}
    factors = {"mse": 9.0, "normalized": 1.0, "cosine": 1.0}
    for kind, (values, loss) in pairs.items():
        assert_close(loss(*on_hidden({0: 3 * s}, {0: 3 * t})), factors[kind] * values)
    assert_close(pairs["cosine"][1](*on_hidden({0: 7 * s}, {0: t})), pairs["cosine"][0])
    assert_close(pairs["normalized"][0], (s - t).square().sum(-1) / t.square().sum(-1))


def test_an_attention_sink_rules_mse_but_not_normalized() -> None:
    s, t = rand(B, T, D), rand(B, T, D, seed=1)
    t[:, 0] *= 1e4
    s[:, 0] *= 1e4
    shares = {}
    for kind in KINDS:
        values = HiddenMatch(kind)(*on_hidden({0: s}, {0: t}))
        shares[kind] = (values[:, 0].sum() / values.sum()).item()
    assert shares["mse"] > 0.999
    assert shares["normalized"] < 0.6
    assert shares["cosine"] < 0.6


def test_hidden_match_averages_the_chosen_layers_that_both_have() -> None:
    student = {i: rand(B, T, D, seed=i) for i in (0, 2, 3)}
    teacher = {i: rand(B, T, D, seed=9 + i) for i in (0, 1, 2, 3)}
    each = {i: HiddenMatch()(*on_hidden({i: student[i]}, {i: teacher[i]})) for i in student}
    signals = on_hidden(student, teacher)
    assert_close(HiddenMatch(layers="all")(*signals), (each[0] + each[2] + each[3]) / 3)
    assert_close(HiddenMatch(layers="edited")(*signals), (each[0] + each[2] + each[3]) / 3)
    assert_close(HiddenMatch(layers="last")(*signals), each[3])
    assert_close(HiddenMatch(layers=[0, 1, 2])(*signals), (each[0] + each[2]) / 2)


def test_hidden_match_without_a_common_layer_raises() -> None:
    state = rand(B, T, D)
    with pytest.raises(ValueError, match=r"HiddenMatch.*student exposes \[1\], the teacher \[2\]"):
        HiddenMatch()(*on_hidden({1: state}, {2: state}))
    with pytest.raises(ValueError, match=r"layers=\[7\]"):
        HiddenMatch(layers=[7])(*on_hidden({1: state}, {1: state}))


# The total.


def test_total_adds_terms_on_logits_and_on_hidden_states() -> None:
    case, slow = Case(), Case()
    state, target = rand(B, T, D, seed=10).requires_grad_(), rand(B, T, D, seed=11)
    match = HiddenMatch()
    terms: Terms = {"hidden": (match, 0.7), **ALL_TERMS}
    student = Signals(case.labels, last_hidden=case.hidden, hidden={5: state})
    teacher = Signals(case.labels, last_hidden=case.teacher_hidden, hidden={5: target})
    total, means = total_loss(terms, student, teacher, (case.weight, case.bias), case.teacher_head, chunk=4)
    expected, expected_means = naive_vocabulary_loss(ALL_TERMS, *slow.inputs())
    mean = match(student, teacher)[case.labels != IGNORE].mean()
    assert_close(total, expected + 0.7 * mean)
    assert list(means) == list(terms)
    assert_close(means["hidden"], mean.detach())
    assert_close(means["ce"], expected_means["ce"])
    assert not any(mean.requires_grad for mean in means.values())
    total.backward()
    assert state.grad is not None
    assert bool((state.grad[case.labels == IGNORE] == 0).all())
    assert case.hidden.grad is not None


def test_no_chunk_is_the_reference_and_every_chunk_gives_what_it_gives() -> None:
    found = []
    for chunk in (None, 4, "auto"):
        case = Case()
        state = rand(B, T, D, seed=10).requires_grad_()
        student = Signals(case.labels, last_hidden=case.hidden, hidden={5: state})
        teacher = Signals(case.labels, last_hidden=case.teacher_hidden, hidden={5: rand(B, T, D, seed=11)})
        terms: Terms = {**CLOSED, "hidden": (HiddenMatch(), 0.7)}
        heads = (case.weight, case.bias), case.teacher_head
        total, means = total_loss(terms, student, teacher, *heads, chunk=chunk, scale=0.5, softcap=4.0)
        total.backward()
        found.append([total.detach(), *means.values(), *case.gradients(), state.grad])
    for whole, chunked, auto in zip(*found, strict=True):
        assert_close(chunked, whole)
        assert_close(auto, whole)


def test_no_chunk_shows_terms_whole_logits() -> None:
    seen: list[torch.Size] = []

    class Spy(KL):
        def __call__(self, student: Signals, teacher: Signals) -> Tensor:
            assert student.logits is not None
            seen.append(student.logits.shape)
            return super().__call__(student, teacher)

    case = Case()
    student, teacher = (Signals(case.labels, last_hidden=x) for x in (case.hidden, case.teacher_hidden))
    total_loss({"kl": (Spy(), 1.0)}, student, teacher, (case.weight, None), case.teacher_head, chunk=None)
    assert seen == [(B, T, V)]


def test_total_without_a_teacher() -> None:
    case = Case()
    student, head = Signals(case.labels, last_hidden=case.hidden), (case.weight, case.bias)
    total, means = total_loss({"ce": (CrossEntropy(), 2.0)}, student, None, head, None)
    assert_close(total.detach(), 2 * means["ce"])
    with pytest.raises(ValueError, match=r"\['kl'\] use the teacher"):
        total_loss({"kl": (KL(), 1.0)}, student, None, head, None)


def test_a_term_of_weight_zero_is_switched_off() -> None:
    case = Case()
    student, head = Signals(case.labels, last_hidden=case.hidden), (case.weight, case.bias)
    off: Terms = {"kl": (KL(), 0.0), "hidden": (HiddenMatch(), 0.0)}
    total, means = total_loss({"ce": (CrossEntropy(), 1.0), **off}, student, None, head, None)
    assert list(means) == ["ce"]
    assert_close(total.detach(), means["ce"])
    with pytest.raises(ValueError, match="every loss weight is 0"):
        total_loss(off, student, None, head, None)


# Errors.


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, "1", None, True])
def test_bad_weight_is_named(weight: float) -> None:
    with pytest.raises(ValueError, match=r"loss\.kl\.weight"):
        chunked_vocabulary_loss({"kl": (KL(), weight)}, *Case().inputs())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "sideways"}, "direction.*sideways"),
        ({"temperature": 0.0}, "temperature.*0"),
        ({"temperature": -1.0}, "temperature.*-1"),
        ({"beta": 0.0}, "beta.*0"),
        ({"beta": 1.0}, "beta.*1"),
    ],
)
def test_bad_kl_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KL(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"kind": "l1"}, {"layers": "first"}, {"layers": []}])
def test_bad_hidden_arguments(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"HiddenMatch (kind|layers)"):
        HiddenMatch(**arguments)


class Summed(KL):
    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        return super().__call__(student, teacher).sum()


class Greedy(KL):
    needs = frozenset({"logits", "hidden"})


class Unknown(KL):
    needs = frozenset({"attention"})


class Matrices(KL):
    needs = frozenset({"matrix"})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Summed(), r"loss\.x returned shape \[\]"),
        (Greedy(), r"loss\.x needs .*split"),
        (Unknown(), r"loss\.x needs \['attention'\]"),
        (Matrices(), r"loss\.x needs \['matrix'\]; known signals are \['hidden', 'logits'\]"),
        (HiddenMatch(), r"\['x'\] do not read logits"),
    ],
    ids=["summed", "greedy", "unknown", "matrix", "hidden"],
)
def test_a_term_that_breaks_the_contract_is_named(loss: Loss, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunked_vocabulary_loss({"x": (loss, 1.0)}, *Case().inputs())


def test_inputs_that_do_not_belong_together_raise() -> None:
    case, kl = Case(), {"kl": (KL(), 1.0)}
    hidden, head, teacher, teacher_head, labels = case.inputs()
    with pytest.raises(ValueError, match="loss is empty"):
        chunked_vocabulary_loss({}, *case.inputs())
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        chunked_vocabulary_loss(kl, *case.inputs(), chunk=0)
    with pytest.raises(ValueError, match="softcap must be > 0"):
        chunked_vocabulary_loss(kl, *case.inputs(), softcap=0.0)
    with pytest.raises(ValueError, match=r"student hidden states \[3, 6, 8\] do not fit labels \[3, 7\]"):
        chunked_vocabulary_loss(kl, hidden[:, 1:], head, teacher, teacher_head, labels)
    with pytest.raises(ValueError, match="one vocabulary"):
        chunked_vocabulary_loss(kl, hidden, head, teacher, (rand(V + 1, D + 2), None), labels)
    with pytest.raises(ValueError, match="have no last_hidden"):
        total_loss(kl, Signals(labels), Signals(labels), head, teacher_head)


def test_every_yaml_holds_one_term_under_its_own_name() -> None:
    for name in ("ce", "kl", "kl_sum", "reverse_kl", "jsd", "hidden", "hidden_cosine"):
        config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        assert list(config) == [name]
        assert config[name]["weight"] > 0
        assert config[name]["_target_"].startswith("iskd.losses.")

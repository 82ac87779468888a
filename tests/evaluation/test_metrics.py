"""Laws of the quality metrics: equal to a plain reference, at any batch size, chunk or number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.evaluation.metrics import Perplexity, QualityMetrics, Retention, TokenKL, Top1Agreement
from iskd.models import IGNORE

B, T, D, V = 5, 9, 8, 13
Batch = tuple[Tensor, tuple[Tensor, Tensor | None], Tensor, tuple[Tensor, Tensor | None], Tensor]


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch() -> Batch:
    teacher, head = rand(B, T, D, seed=0), (rand(V, D, seed=1), rand(V, seed=2))
    student = teacher + 0.5 * rand(B, T, D, seed=3)
    # Half of the labels are what the teacher predicts, so that its accuracy is neither 0 nor 1.
    labels = F.linear(teacher, *head).argmax(-1)
    labels[:, ::2] = torch.randint(V, labels[:, ::2].shape, generator=torch.Generator().manual_seed(4))
    labels[1, 5:] = IGNORE
    labels[3] = IGNORE
    return student, head, teacher, head, labels


def reference(batch: Batch) -> dict[str, float]:
    student, student_head, teacher, teacher_head, labels = batch
    keep = labels != IGNORE
    s, t, y = F.linear(student, *student_head)[keep], F.linear(teacher, *teacher_head)[keep], labels[keep]
    nll = F.cross_entropy(s, y).item()
    kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True).item()
    hits, teacher_hits = (s.argmax(-1) == y).sum().item(), (t.argmax(-1) == y).sum().item()
    return {
        "ppl": math.exp(nll),
        "nll": nll,
        "kl": kl,
        "top1": (s.argmax(-1) == t.argmax(-1)).double().mean().item(),
        "retention": hits / teacher_hits,
        "teacher_ppl": math.exp(F.cross_entropy(t, y).item()),
    }


def rows(batch: Batch, at: slice) -> Batch:
    student, student_head, teacher, teacher_head, labels = batch
    return student[at], student_head, teacher[at], teacher_head, labels[at]


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_equal_to_the_reference_at_any_batch_size_and_chunk(batch: Batch, batch_size: int, chunk: int) -> None:
    metrics = QualityMetrics()
    for start in range(0, B, batch_size):
        metrics.update_from_hidden(*rows(batch, slice(start, start + batch_size)), chunk=chunk)
    got, expected = metrics.compute(), reference(batch)
    assert list(got) == ["ppl", "nll", "kl", "top1", "retention", "teacher_ppl"]
    assert got == pytest.approx(expected, rel=1e-12)
    assert 0 < got["top1"] < 1
    assert 0 < got["retention"] < 1


def test_ranks_add_up(batch: Batch) -> None:
    ranks = [QualityMetrics(), QualityMetrics()]
    # Uneven on purpose: a mean of the ranks' means would be wrong.
    ranks[0].update_from_hidden(*rows(batch, slice(0, 1)))
    ranks[1].update_from_hidden(*rows(batch, slice(1, B)))
    for name in ("ppl", "teacher_ppl", "kl", "top1", "retention"):
        getattr(ranks[0], name).merge_state(getattr(ranks[1], name))
    assert ranks[0].compute() == pytest.approx(reference(batch), rel=1e-12)


def test_compute_gathers_the_states_of_other_ranks(batch: Batch) -> None:
    student, head, teacher, teacher_head, labels = batch
    logits, teacher_logits = F.linear(student, *head), F.linear(teacher, *teacher_head)
    mine, other = TokenKL(), TokenKL()
    mine.update(logits[:1], teacher_logits[:1], labels[:1])
    other.update(logits[1:], teacher_logits[1:], labels[1:])
    theirs = iter([other.total, other.tokens])
    mine.dist_sync_fn = lambda x, group: [x, next(theirs)]
    mine.distributed_available_fn = lambda: True
    assert mine.compute().item() == pytest.approx(reference(batch)["kl"], rel=1e-12)


def test_identical_models_keep_everything(batch: Batch) -> None:
    _, _, teacher, head, labels = batch
    metrics = QualityMetrics()
    metrics.update_from_hidden(teacher, head, teacher, head, labels)
    got = metrics.compute()
    assert got["retention"] == 1
    assert got["top1"] == 1
    assert got["kl"] == pytest.approx(0, abs=1e-12)
    assert got["ppl"] == got["teacher_ppl"]


def test_a_uniform_student_has_the_perplexity_of_its_vocabulary(batch: Batch) -> None:
    labels = batch[-1]
    metric = Perplexity()
    metric.update(torch.zeros(B, T, V), None, labels)
    assert metric.compute().item() == pytest.approx(V)


def test_scale_and_softcap_reach_both_models(batch: Batch) -> None:
    student, head, teacher, teacher_head, labels = batch
    metrics, plain = QualityMetrics(), QualityMetrics()
    metrics.update_from_hidden(*batch, scale=0.5, softcap=2.0)
    logits = [torch.tanh(F.linear(*x) * 0.5 / 2) * 2 for x in ((student, *head), (teacher, *teacher_head))]
    plain.update(logits[0], logits[1], labels)
    assert metrics.compute() == pytest.approx(plain.compute(), rel=1e-12)


def test_reset_forgets_and_half_precision_is_summed_in_float64(batch: Batch) -> None:
    metrics = QualityMetrics()
    metrics.update_from_hidden(*batch)
    metrics.reset()
    student, (weight, _), teacher, _, labels = batch
    low = (weight.bfloat16(), None)
    metrics.update_from_hidden(student.bfloat16(), low, teacher.bfloat16(), low, labels)
    assert metrics.kl.total.dtype == torch.float64
    assert metrics.kl.tokens.item() == (labels != IGNORE).sum().item()


def test_nothing_is_recorded_for_autograd_or_saved(batch: Batch) -> None:
    batch[0].requires_grad_()
    metrics = QualityMetrics()
    metrics.update_from_hidden(*batch)
    assert not metrics.kl.total.requires_grad
    assert not metrics.state_dict()


def test_a_model_that_says_nan_has_no_quality(batch: Batch) -> None:
    """In one logit of one token; not a share of tokens at which it seems to be right."""
    for broken in (0, 1):
        logits = [F.linear(states, *head) for states, head in (batch[:2], batch[2:4])]
        logits[broken][0, 0, 3] = torch.nan
        logits[broken][3] = torch.nan  # without a label
        metrics = QualityMetrics()
        metrics.update(logits[0], logits[1], batch[4])
        found = metrics.compute()
        assert math.isfinite(found[("teacher_ppl", "ppl")[broken]])
        assert all(math.isnan(found[name]) for name in ("kl", "top1", "retention", ("ppl", "teacher_ppl")[broken]))


def test_retention_without_a_correct_teacher_token_is_nan() -> None:
    metric, labels = Retention(), torch.zeros(3, dtype=torch.int64)
    right, wrong = torch.tensor([[1.0, 0.0]]).expand(3, 2), torch.tensor([[0.0, 1.0]]).expand(3, 2)
    metric.update(right, wrong, labels)
    assert math.isnan(metric.compute().item())


@pytest.mark.parametrize("metric", [TokenKL(), Top1Agreement(), Retention()], ids=lambda metric: type(metric).__name__)
def test_comparison_needs_a_teacher(metric: TokenKL | Top1Agreement | Retention) -> None:
    with pytest.raises(ValueError, match=rf"{type(metric).__name__} compares with the teacher"):
        metric.update(torch.zeros(2, V), None, torch.zeros(2, dtype=torch.int64))


def test_shapes_that_do_not_belong_together_raise(batch: Batch) -> None:
    student, head, teacher, teacher_head, labels = batch
    with pytest.raises(ValueError, match=r"teacher hidden states \[5, 8, 8\] do not fit labels \[5, 9\]"):
        QualityMetrics().update_from_hidden(student, head, teacher[:, 1:], teacher_head, labels)
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        QualityMetrics().update_from_hidden(*batch, chunk=0)

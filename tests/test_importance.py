"""Laws of importance, for every score in conf/importance: higher = keep, deterministic, nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd import surgery
from iskd.arch import Stack
from iskd.capture import capture
from iskd.importance import bi_veto
from iskd.importance.ablation import Ablation
from iskd.importance.base import scoring
from iskd.importance.bi_veto import BlockInfluenceVeto
from iskd.importance.block_influence import BlockInfluence
from iskd.importance.random import Random
from iskd.plan import Record, Remove, Replace, Spec
from tests.factories import FAMILIES, conf_group, digest, hooks, modes, silence, tiny, windows

PARTS = conf_group("importance")
READERS = sorted(set(PARTS) - {"random"})
BATCHES = [windows(3, 16, seed=1), windows(2, 12, seed=2)]


def make(name: str) -> Any:
    values = {key: value for key, value in PARTS[name].items() if not key.startswith("_")}
    return get_class(PARTS[name]["_target_"])(**values)


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    """A student with a gap and two foreign blocks."""
    student = copy.deepcopy(teacher)
    bottleneck = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 3, "zero_up": False})
    slim = Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})
    surgery.apply(student, Record(5), [Replace(0, bottleneck), Remove(1), Replace(3, slim)])
    return student


@pytest.mark.parametrize("name", PARTS)
def test_there_is_one_finite_score_per_block_and_always_the_same(name: str) -> None:
    teacher = tiny("llama", layers=5, dropout=0.3)
    student = student_of(teacher)
    first = make(name)(student, teacher, BATCHES)
    assert first.shape == (4,)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert first.device.type == "cpu"
    assert torch.equal(first, make(name)(student.train(), teacher, BATCHES))


@pytest.mark.parametrize("name", PARTS)
def test_models_are_left_as_they_were_found(name: str) -> None:
    teacher = tiny("gpt2", layers=5, dropout=0.3)
    student = student_of(teacher).train()
    Stack(student).layers[1].eval()
    student.get_input_embeddings().weight.grad = torch.ones(101, 48)
    models = (student, teacher)
    before = [(digest(model), modes(model), hooks(model)) for model in models]
    state = torch.get_rng_state()
    make(name)(student, teacher, BATCHES)
    assert [(digest(model), modes(model), hooks(model)) for model in models] == before
    assert torch.equal(torch.get_rng_state(), state)
    grads = [key for key, p in student.named_parameters() if p.grad is not None]
    assert len(grads) == 1
    assert torch.equal(student.get_input_embeddings().weight.grad, torch.ones(101, 48))
    assert all(p.requires_grad for p in student.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", READERS)
def test_modes_and_hooks_come_back_after_an_exception(name: str) -> None:
    teacher = tiny("llama")
    student = copy.deepcopy(teacher).train()
    with pytest.raises(IndexError):
        make(name)(student, teacher, [torch.tensor([[5000] * 8])])
    assert all(modes(student))
    assert not any(modes(teacher))
    assert hooks(student) == hooks(teacher) == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", READERS)
def test_a_block_that_does_nothing_scores_lowest(family: str, name: str) -> None:
    teacher = tiny(family, layers=5)
    silence(teacher, 3)
    scores = make(name)(copy.deepcopy(teacher), teacher, BATCHES)
    assert scores.argmin() == 3
    assert scores[3] == pytest.approx(0, abs=1e-5)
    assert scores.sort().values[1] > 1e-5


# bi_veto looks for outliers in its first batches only
@pytest.mark.parametrize("name", sorted(set(READERS) - {"bi_veto"}))
def test_scores_are_means_over_tokens(name: str) -> None:
    teacher = tiny("llama", layers=5)
    student = student_of(teacher)
    one = make(name)(student, teacher, BATCHES[:1])
    twice = make(name)(student, teacher, [BATCHES[0], BATCHES[0]])
    rows = make(name)(student, teacher, list(BATCHES[0].split(1)))
    torch.testing.assert_close(twice, one)
    torch.testing.assert_close(rows, one)


@torch.no_grad()
def removed_one_by_one(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor], stride: int
) -> Tensor:
    """KL to the teacher of students that really lack the block, one token at a time."""
    scores = []
    for position in range(len(Stack(student).layers)):
        short = copy.deepcopy(student)
        surgery.apply(short, Record(len(Stack(student).layers)), [Remove(position)])
        values = []
        for batch in batches:
            p, q = (model(batch).logits.double().log_softmax(-1) for model in (teacher, short))
            for row in range(batch.shape[0]):
                for token in range(0, batch.shape[1], stride):
                    values.append(nn.functional.kl_div(q[row, token], p[row, token], log_target=True, reduction="sum"))
        scores.append(torch.stack(values).mean())
    return torch.stack(scores)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_the_kl_of_a_student_without_the_block(family: str, stride: int) -> None:
    teacher = tiny(family, layers=5)
    student = student_of(teacher)
    reference = removed_one_by_one(student, teacher, BATCHES, stride)
    scores = Ablation(stride)(student, teacher, BATCHES)
    torch.testing.assert_close(scores.double(), reference, atol=1e-5, rtol=1e-4)


def test_ablation_of_a_teacher_that_has_learnt(teacher: PreTrainedModel, said: list[Tensor]) -> None:
    scores = Ablation()(teacher, teacher, [said[0]])
    reference = removed_one_by_one(teacher, teacher, [said[0]], 4)
    torch.testing.assert_close(scores.double(), reference, atol=1e-4, rtol=1e-4)
    assert (scores > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_block_influence_is_the_mean_turn_of_the_stream(family: str) -> None:
    teacher = tiny(family, layers=5)
    student = student_of(teacher)
    turns: list[list[Tensor]] = [[] for _ in range(4)]
    for batch in BATCHES:
        stack = Stack(student)
        first: list[Tensor] = []
        handle = stack.layers[0].register_forward_pre_hook(lambda _module, args, first=first: first.append(args[0]))
        with capture(stack, range(4), range(4)) as states:
            student(batch)
        handle.remove()
        stream = [first[0], *(states[i].double() for i in range(4))]
        for position in range(4):
            for row in range(batch.shape[0]):
                for token in range(1, batch.shape[1]):
                    a, b = (stream[position + i][row, token].double() for i in (0, 1))
                    turns[position].append(1 - a @ b / (a.norm() * b.norm()))
    reference = torch.stack([torch.stack(values).mean() for values in turns])
    scores = BlockInfluence()(student, teacher, BATCHES)
    torch.testing.assert_close(scores.double(), reference, atol=1e-5, rtol=1e-4)


def test_block_influence_leaves_the_first_position_out() -> None:
    teacher = tiny("llama")
    # the first token is in every later state too, but not in that of a block that mixes nothing
    for position in range(4):
        for parameter in Stack(teacher).layers[position].get_submodule("self_attn.o_proj").parameters():
            nn.init.zeros_(parameter)
    other = BATCHES[0].clone()
    other[:, 0] = (other[:, 0] + 1) % 101
    score = BlockInfluence()
    assert torch.equal(score(teacher, teacher, [BATCHES[0]]), score(teacher, teacher, [other]))


class Scaled(nn.Module):
    """A block that only makes the stream longer: no cosine can see it, and every later block depends on it."""

    def forward(self, h_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
        return 3 * h_BTD


def test_a_block_that_the_cosine_does_not_see_is_vetoed() -> None:
    teacher = tiny("llama", layers=5)
    Stack(teacher).set_layers([Scaled(), *list(Stack(teacher).layers)[1:]])
    blind = BlockInfluence()(teacher, teacher, BATCHES)
    assert blind.argmin() == 0
    assert blind[0] == pytest.approx(0, abs=1e-5)
    seeing = BlockInfluenceVeto()(teacher, teacher, BATCHES)
    assert seeing.argmax() == 0
    assert seeing[0] == pytest.approx(2, abs=1e-5)
    torch.testing.assert_close(seeing[1:], blind[1:])


@pytest.mark.parametrize(
    ("factor", "vetoed"), [(1.5, [False, True, False, True, False]), (3.0, [False, True, False, False, False])]
)
def test_the_veto_adds_two_to_what_costs_more_than_factor_times_the_median(
    monkeypatch: pytest.MonkeyPatch, factor: float, vetoed: list[bool]
) -> None:
    turn, cost = torch.tensor([0.5, 0.01, 0.2, 0.3, 1.9]), torch.tensor([1.0, 9.0, 0.1, 2.0, 1.0])
    monkeypatch.setattr(bi_veto, "cosine_influence", lambda student, batches: turn)
    monkeypatch.setattr(bi_veto, "ablation_kl", lambda student, teacher, batches, stride: cost)
    model = tiny("llama", layers=5)
    scores = BlockInfluenceVeto(factor)(model, model, BATCHES)
    torch.testing.assert_close(scores, turn + 2.0 * torch.tensor(vetoed))


@pytest.mark.parametrize("count", [1, 2])
def test_the_veto_reads_the_first_batches(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    seen: list[Sequence[Tensor]] = []

    def watched(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor], stride: int) -> Tensor:
        seen.append(batches)
        return torch.ones(4)

    monkeypatch.setattr(bi_veto, "ablation_kl", watched)
    model = tiny("llama")
    scores = BlockInfluenceVeto(veto_batches=count)(model, model, BATCHES)
    assert [id(batch) for batch in seen[0]] == [id(batch) for batch in BATCHES[:count]]
    assert torch.equal(scores, BlockInfluence()(model, model, BATCHES))


def test_random_scores_follow_their_seed() -> None:
    model = tiny("llama")
    one, other = (Random(seed)(model, model, BATCHES) for seed in (0, 1))
    assert not torch.equal(one, other)
    assert ((one >= 0) & (one < 1)).all()


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"importance.stride must be at least 1, got 0"):
        Ablation(0)
    with pytest.raises(ValueError, match=r"importance.factor must be above 1 .*got 1"):
        BlockInfluenceVeto(factor=1)
    with pytest.raises(ValueError, match=r"importance.veto_batches must be at least 1, got 0"):
        BlockInfluenceVeto(veto_batches=0)


def test_scoring_restores_each_module_by_itself() -> None:
    model = tiny("llama").train()
    model.get_submodule("lm_head").eval()
    before = modes(model)
    with scoring(model):
        assert not any(modes(model))
        assert not torch.is_grad_enabled()
    assert modes(model) == before

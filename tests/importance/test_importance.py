"""Laws of importance, for every score in conf/importance: higher = keep, deterministic, nothing left behind.

The references are loops over windows, tokens and parameters around the model as transformers runs it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.importance import bi_veto, taylor
from iskd.importance.ablation import Ablation
from iskd.importance.angular import Angular, angular_windows
from iskd.importance.base import WindowImportance, by_layer
from iskd.importance.bi_veto import BlockInfluenceVeto
from iskd.importance.block_influence import BlockInfluence
from iskd.importance.fixed import Fixed
from iskd.importance.hidden_mse import HiddenMSE
from iskd.importance.magnitude import Magnitude
from iskd.importance.noise import standard_error, within_noise
from iskd.importance.random import Random
from iskd.importance.taylor import Taylor
from iskd.models import Stack, scoring, surgery
from iskd.models.capture import capture
from iskd.plan import Record, Remove, Replace, Spec
from tests.factories import FAMILIES, conf_group, digest, hooks, modes, silence, tiny, windows

# items of tasks are files that a clone may lack; what reads them is tested with items of its own;
# what needs a conversion to score is in test_attention.py
PARTS = {
    name: part
    for name, part in conf_group("importance").items()
    if "data_dir" not in part and "convert" not in getattr(get_class(part["_target_"]), "takes", ())
}
# these read no text: one column, and a block may do nothing with large weights
WINDOWLESS = ("fixed", "magnitude", "random")
READERS = sorted(set(PARTS) - set(WINDOWLESS))
# a part with a score of its own may leave rows unmeasured: racing does, for blocks that are out
COMPLETE = [name for name in PARTS if get_class(PARTS[name]["_target_"]).__call__ is WindowImportance.__call__]
BATCHES = [windows(3, 16, seed=1), windows(2, 12, seed=2)]
# a mean over windows is one over tokens only if they are equally long
EQUAL = [windows(3, 16, seed=1), windows(2, 16, seed=2)]


def make(name: str, blocks: int = 4) -> Any:
    values = {key: value for key, value in PARTS[name].items() if not key.startswith("_")}
    if name == "fixed":
        values["order"] = list(reversed(range(blocks)))
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


@pytest.mark.parametrize("name", COMPLETE)
def test_a_score_is_the_mean_of_its_rows_by_window(name: str) -> None:
    teacher = tiny("qwen3", layers=5, dropout=0.3)
    student = student_of(teacher).train()
    rows = make(name).rows(student, teacher, BATCHES)
    assert rows.shape == (4, 1 if name in WINDOWLESS else 5)
    assert rows.dtype == torch.float32
    assert rows.device.type == "cpu"
    assert not rows.requires_grad
    torch.testing.assert_close(make(name)(student, teacher, BATCHES), rows.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PARTS)
def test_models_are_left_as_they_were_found(name: str) -> None:
    teacher = tiny("gpt2", layers=5, dropout=0.3)
    student = student_of(teacher).train()
    Stack(student).layers[1].eval()
    student.get_input_embeddings().weight.grad = torch.ones(101, 48)
    frozen = list(Stack(student).layers[2].parameters())
    for parameter in frozen:
        parameter.requires_grad_(False)
    models = (student, teacher)
    before = [(digest(model), modes(model), hooks(model)) for model in models]
    state = torch.get_rng_state()
    make(name)(student, teacher, BATCHES)
    assert [(digest(model), modes(model), hooks(model)) for model in models] == before
    assert torch.equal(torch.get_rng_state(), state)
    grads = [key for key, p in student.named_parameters() if p.grad is not None]
    assert len(grads) == 1
    assert torch.equal(student.get_input_embeddings().weight.grad, torch.ones(101, 48))
    assert [id(p) for p in student.parameters() if not p.requires_grad] == [id(p) for p in frozen]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", READERS)
def test_modes_and_hooks_come_back_after_an_exception(name: str) -> None:
    teacher = tiny("llama")
    student = copy.deepcopy(teacher).train()
    with pytest.raises(IndexError):
        make(name)(student, teacher, [torch.tensor([[5000] * 8])])
    assert all(modes(student))
    assert not any(modes(teacher))
    assert all(p.requires_grad for p in student.parameters())
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
def test_scores_do_not_depend_on_batches(name: str) -> None:
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
    reference = removed_one_by_one(student, teacher, EQUAL, stride)
    scores = Ablation(stride)(student, teacher, EQUAL)
    torch.testing.assert_close(scores.double(), reference, atol=1e-5, rtol=1e-4)


def test_ablation_of_a_teacher_that_has_learnt(teacher: PreTrainedModel, said: list[Tensor]) -> None:
    scores = Ablation()(teacher, teacher, [said[0]])
    reference = removed_one_by_one(teacher, teacher, [said[0]], 4)
    torch.testing.assert_close(scores.double(), reference, atol=1e-4, rtol=1e-4)
    assert (scores > 1e-3).all()


@torch.no_grad()
def stream_of(model: PreTrainedModel, window: Tensor) -> list[Tensor]:
    """Stream before the first and after every block [T, D] for one window [1, T], from the model's own pass."""
    layers = Stack(model).layers
    first: list[Tensor] = []
    handle = layers[0].register_forward_pre_hook(lambda _module, args: first.append(args[0]))
    with capture(Stack(model), range(len(layers)), range(len(layers))) as states:
        model(window)
    handle.remove()
    return [state[0].double() for state in (*first, *(states[i] for i in range(len(layers))))]


def turn(a: Tensor, b: Tensor) -> float:
    return 1 - float(a @ b / (a.norm() * b.norm()))


def angle(a: Tensor, b: Tensor) -> float:
    return math.acos(min(1.0, float(a @ b / (a.norm() * b.norm())))) / math.pi


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def turned(x: Tensor, y: Tensor) -> float:
    return mean([turn(x[token], y[token]) for token in range(1, len(x))])


def moved(x: Tensor, y: Tensor) -> float:
    pairs = [(float((y[t] - x[t]).square().mean()), float(y[t].square().mean())) for t in range(1, len(x))]
    return mean([distance for distance, _ in pairs]) / mean([size for _, size in pairs])


def turned_at_the_end(x: Tensor, y: Tensor) -> float:
    return angle(x[-1], y[-1])


def turned_everywhere(x: Tensor, y: Tensor) -> float:
    return mean([angle(x[token], y[token]) for token in range(1, len(x))])


def window_by_window(student: PreTrainedModel, measure: Callable[[Tensor, Tensor], float]) -> Tensor:
    columns = []
    for batch in BATCHES:
        for window in batch.split(1):
            stream = stream_of(student, window)
            columns.append([measure(x, y) for x, y in itertools.pairwise(stream)])
    return torch.tensor(columns).T


def slopes(student: PreTrainedModel) -> Tensor:
    """|sum of weight x gradient| of every block on every window, from the whole model's backward pass."""
    columns = []
    for batch in BATCHES:
        for window in batch.split(1):
            model = copy.deepcopy(student)
            nn.functional.cross_entropy(model(window).logits[0, :-1], window[0, 1:]).backward()
            blocks = [[p for p in block.parameters() if p.grad is not None] for block in Stack(model).layers]
            columns.append([abs(sum(float((p.detach() * p.grad).sum()) for p in block)) for block in blocks])
    return torch.tensor(columns).T


def sizes(student: PreTrainedModel, power: int) -> Tensor:
    scores = []
    for block in Stack(student).layers:
        values = [abs(w) ** power for p in block.parameters() if p.ndim > 1 for w in p.flatten().tolist()]
        scores.append([mean(values) ** (1 / power)])
    return torch.tensor(scores)


REFERENCES: list[tuple[Any, Callable[[PreTrainedModel], Tensor]]] = [
    (BlockInfluence(), lambda student: window_by_window(student, turned)),
    (HiddenMSE(), lambda student: window_by_window(student, moved)),
    (Angular(), lambda student: window_by_window(student, turned_at_the_end)),
    (Angular(tokens="mean"), lambda student: window_by_window(student, turned_everywhere)),
    (Taylor(), slopes),
    (Taylor(chunk=5), slopes),
    (Magnitude(), lambda student: sizes(student, 1)),
    (Magnitude("l2"), lambda student: sizes(student, 2)),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("importance", "reference"),
    REFERENCES,
    ids=[f"{type(part).__name__}-{i}" for i, (part, _) in enumerate(REFERENCES)],
)
def test_rows_are_those_of_an_obvious_loop(
    family: str, importance: Any, reference: Callable[[PreTrainedModel], Tensor]
) -> None:
    teacher = tiny(family, layers=5)
    student = student_of(teacher)
    rows = importance.rows(student, teacher, BATCHES)
    torch.testing.assert_close(rows, reference(student).to(rows.dtype), atol=1e-5, rtol=1e-5)


def test_the_veto_is_the_cosine_plus_two_for_outliers() -> None:
    teacher = tiny("llama", layers=5)
    silence(teacher, 1)
    silence(teacher, 3)
    cost = removed_one_by_one(teacher, teacher, BATCHES[:1], 4)
    expected = window_by_window(teacher, turned) + 2.0 * (cost > 1.2 * cost.median())[:, None]
    assert (expected > 2).any()
    rows = BlockInfluenceVeto(factor=1.2).rows(teacher, teacher, BATCHES)
    torch.testing.assert_close(rows, expected.float(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def hidden_states(model: PreTrainedModel) -> list[list[Tensor]]:
    """What transformers hands out for each batch: the last one after the final norm."""
    return [list(model(batch, output_hidden_states=True).hidden_states) for batch in BATCHES]


@pytest.mark.parametrize("family", FAMILIES)
def test_as_published_scores_read_the_hidden_states_of_transformers(family: str) -> None:
    model = tiny(family, layers=3).eval()
    pairs = [list(itertools.pairwise(states)) for states in hidden_states(model)]
    cosines = [[1 - torch.cosine_similarity(x, y, -1).mean(1) for x, y in batch] for batch in pairs]
    squares = [[(x - y).square().mean((1, 2)) for x, y in batch] for batch in pairs]
    for importance, expected in ((BlockInfluence(published=True), cosines), (HiddenMSE(published=True), squares)):
        rows = torch.cat([torch.stack(columns) for columns in expected], 1)
        torch.testing.assert_close(importance.rows(model, model, BATCHES), rows, atol=1e-5, rtol=1e-5)


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
    assert Angular()(teacher, teacher, BATCHES)[0] == pytest.approx(0, abs=1e-5)
    assert HiddenMSE()(teacher, teacher, BATCHES)[0] == pytest.approx(4 / 9)
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
    turned, cost = torch.tensor([0.5, 0.01, 0.2, 0.3, 1.9]), torch.tensor([1.0, 9.0, 0.1, 2.0, 1.0])
    monkeypatch.setattr(bi_veto, "cosine_rows", lambda student, batches: turned[:, None])
    monkeypatch.setattr(bi_veto, "leave_one_out_rows", lambda student, teacher, batches, stride: cost[:, None])
    model = tiny("llama", layers=5)
    scores = BlockInfluenceVeto(factor)(model, model, BATCHES)
    torch.testing.assert_close(scores, turned + 2.0 * torch.tensor(vetoed))


@pytest.mark.parametrize("count", [1, 2])
def test_the_veto_reads_the_first_batches(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    seen: list[Sequence[Tensor]] = []

    def watched(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor], stride: int) -> Tensor:
        seen.append(batches)
        return torch.ones(4, 1)

    monkeypatch.setattr(bi_veto, "leave_one_out_rows", watched)
    model = tiny("llama")
    scores = BlockInfluenceVeto(veto_batches=count)(model, model, BATCHES)
    assert [id(batch) for batch in seen[0]] == [id(batch) for batch in BATCHES[:count]]
    assert torch.equal(scores, BlockInfluence()(model, model, BATCHES))


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_all_runs_of_blocks_from_one_pass(tokens: str) -> None:
    student = student_of(tiny("gpt2", layers=5)).train()
    measure = turned_at_the_end if tokens == "last" else turned_everywhere
    table = angular_windows(student, BATCHES, 5, tokens)
    assert table.shape == (5, 4)
    assert all(modes(student))
    student.eval()
    streams = [stream_of(student, window) for batch in BATCHES for window in batch.split(1)]
    for n in range(1, 6):
        for start in range(4):
            if start + n > 4:
                assert table[n - 1, start].isnan()
                continue
            expected = mean([measure(stream[start], stream[start + n]) for stream in streams])
            assert table[n - 1, start] == pytest.approx(expected, abs=1e-5)


def test_the_best_run_of_blocks_goes_first() -> None:
    teacher = tiny("llama", layers=6)
    for position in (2, 3):
        silence(teacher, position)
    scores = Angular(window=2)(teacher, teacher, BATCHES)
    assert scores.isfinite().all()
    assert sorted(scores.argsort()[:2].tolist()) == [2, 3]
    assert scores[2] == scores[3] == pytest.approx(0, abs=1e-5)
    table = angular_windows(teacher, BATCHES, 2)
    assert scores[0] == table[1, 0]
    assert scores[5] == table[1, 4]
    assert scores[1] == min(table[1, 0], table[1, 1])


def test_small_angles_are_not_rounded_away() -> None:
    teacher = tiny("llama", layers=3)
    silence(teacher, 1)
    with torch.no_grad():
        Stack(teacher).layers[1].get_submodule("mlp.down_proj").get_parameter("weight").normal_(std=1e-6)
    expected = mean([angle_by_sine(*stream_of(teacher, w)[1:3]) for batch in BATCHES for w in batch.split(1)])
    assert 0 < expected < 1e-4
    assert Angular()(teacher, teacher, BATCHES)[1] == pytest.approx(expected, rel=0.05)


def angle_by_sine(x: Tensor, y: Tensor) -> float:
    a, b = x[-1], y[-1]
    across = b - a * (a @ b) / (a @ a)
    return math.asin(float(across.norm() / b.norm())) / math.pi


def test_taylor_is_the_slope_of_the_loss_along_a_common_factor() -> None:
    model = tiny("llama")
    window, step = BATCHES[0][:1], 1e-2
    for position in range(4):
        losses = []
        for factor in (1 + step, 1 - step):
            scaled = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in Stack(scaled).layers[position].parameters():
                    parameter *= factor
                losses.append(nn.functional.cross_entropy(scaled(window).logits[0, :-1].double(), window[0, 1:]))
        slope = abs(float(losses[0] - losses[1])) / (2 * step)
        assert Taylor()(model, model, [window])[position] == pytest.approx(slope, rel=0.05, abs=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_taylor_gets_its_gradients_wherever_it_is_called(context: Callable[[], Any]) -> None:
    model = tiny("llama").requires_grad_(False)
    expected = Taylor()(model, model, BATCHES)
    with context():
        scores = Taylor()(model, model, [batch + 0 for batch in BATCHES])
    assert torch.equal(scores, expected)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", sorted(set(READERS) & set(COMPLETE)))
def test_scores_under_autocast_are_close(name: str) -> None:
    model = tiny("llama", layers=5, hidden=96, heads=6, initializer_range=0.1)
    expected = make(name).rows(model, model, BATCHES)
    with torch.autocast("cpu", torch.bfloat16):
        model(BATCHES[0])  # leaves casts of the weights behind
        rows = make(name).rows(model, model, BATCHES)
        assert torch.is_autocast_cache_enabled()
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, expected, rtol=0.25, atol=0.05 * float(expected.abs().max()))


def test_taylor_refuses_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(taylor, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"importance=taylor needs whole weights, .* or choose another importance"):
        Taylor()(model, model, BATCHES)


def test_random_scores_follow_their_seed() -> None:
    model = tiny("llama")
    one, other = (Random(seed)(model, model, BATCHES) for seed in (0, 1))
    assert not torch.equal(one, other)
    assert ((one >= 0) & (one < 1)).all()
    assert torch.equal(one, torch.rand(4, generator=torch.Generator().manual_seed(0)))


def test_fixed_scores_are_those_of_the_configuration() -> None:
    model = tiny("llama")
    assert Fixed(scores=[0.5, 2, -1.0, 0])(model, model, BATCHES).tolist() == [0.5, 2, -1, 0]
    scores = Fixed(order=[2, 0, 3, 1])(model, model, BATCHES)
    assert scores.tolist() == [1, 3, 0, 2]
    assert scores.argsort().tolist() == [2, 0, 3, 1], "the lowest score goes first"


def test_a_block_without_matrices_has_no_magnitude() -> None:
    model = tiny("llama")
    Stack(model).set_layers([Scaled(), *list(Stack(model).layers)[1:]])
    assert Magnitude()(model, model, BATCHES)[0] == 0


def test_standard_errors_are_those_of_numpy() -> None:
    rows = 1000 + torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    expected = rows.double().numpy().std(axis=1, ddof=1) / np.sqrt(7)
    assert standard_error(rows).dtype == torch.float32
    np.testing.assert_allclose(standard_error(rows).numpy(), expected, rtol=1e-5)
    assert standard_error(rows[:, :1]).isnan().all()


def test_choices_within_noise_are_told() -> None:
    hard = torch.tensor([0.0, 5.0, 1.0, 9.0])  # by far the largest spread, and the same for all blocks
    wobble = torch.tensor([0.1, -0.1, 0.1, -0.1])
    rows = torch.stack([hard, hard + 0.01 + wobble, hard + 0.3 + wobble, hard - 0.3 + wobble, hard])
    assert (standard_error(rows) > 1).all(), "unpaired, nothing could be told apart"
    assert within_noise(rows, 0, range(5)) == [1, 4]
    assert within_noise(rows, 0, [4, 3, 2]) == [4]
    assert within_noise(rows, 0, [0]) == []
    # +-0.1 on four windows: a standard error of 0.2 / sqrt(12)
    for shift, told in ((0.057, [1]), (0.059, [])):
        assert within_noise(torch.stack([hard, hard + shift + wobble]), 0, [1]) == told
    assert within_noise(rows[:, :1], 0, range(5)) == [], "one window says nothing about noise"


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the importance of layers \[2\] is not finite"):
        by_layer(torch.tensor([1.0, torch.nan]), [0, 2])
    assert by_layer(torch.tensor([1.0, 0.5]), [0, 2]) == {0: 1.0, 2: 0.5}


@pytest.mark.parametrize("name", READERS)
def test_a_model_that_breaks_on_the_way_gives_no_order(name: str) -> None:
    """Also where scores decide inside: a race, the best run of blocks, a veto."""
    teacher = tiny("llama", vocab=257)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        next(Stack(student).layers[2].parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the importance of .* is not finite"):
        by_layer(make(name)(student, teacher, BATCHES), range(4))


@pytest.mark.parametrize("importance", [BlockInfluence(), HiddenMSE(), Angular(), Taylor()])
def test_windows_of_one_token_are_refused(importance: Any) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"importance needs windows of at least 2 tokens, got a batch \[3, 1\]"):
        importance(model, model, [BATCHES[0][:, :1]])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ablation(0), r"importance.stride must be at least 1, got 0"),
        (lambda: BlockInfluenceVeto(factor=1), r"importance.factor must be above 1 .*got 1"),
        (lambda: BlockInfluenceVeto(veto_batches=0), r"importance.veto_batches must be at least 1, got 0"),
        (lambda: Angular(0), r"importance.window must be at least 1 block, got 0"),
        (lambda: Angular(tokens="first"), r"importance.tokens='first': choose 'last' or 'mean'"),
        (lambda: Magnitude("l3"), r"importance.norm='l3': choose 'l1' or 'l2'"),
        (lambda: Taylor(0), r"importance.chunk must be at least 1 position, got 0"),
        (lambda: Fixed(), r"takes either importance.scores or importance.order, got None and None"),
        (lambda: Fixed([1.0], [0]), r"takes either importance.scores or importance.order, got \[1.0\] and \[0\]"),
        (lambda: Fixed(order=[0, 2, 2]), r"importance.order must name each block from 0 to 2 once.*got \[0, 2, 2\]"),
    ],
)
def test_bad_values_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (Fixed([1.0, 2.0]), r"importance.scores holds 2 entries, but the student has 4 blocks"),
        (Fixed(order=[1, 0, 2]), r"importance.order holds 3 entries, but the student has 4 blocks"),
        (Angular(5), r"importance.window=5 does not fit into a student of 4 blocks"),
    ],
)
def test_values_that_do_not_fit_the_student_are_refused(importance: Any, message: str) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        importance(model, model, BATCHES)
    with pytest.raises(ValueError, match=r"max_window must be at least 1 block, got 0"):
        angular_windows(model, BATCHES, 0)
    with pytest.raises(ValueError, match=r"importance.tokens='all'"):
        angular_windows(model, BATCHES, 1, "all")


def test_scoring_restores_each_module_by_itself() -> None:
    model = tiny("llama").train()
    model.get_submodule("lm_head").eval()
    before = modes(model)
    with scoring(model):
        assert not any(modes(model))
        assert not torch.is_grad_enabled()
    assert modes(model) == before

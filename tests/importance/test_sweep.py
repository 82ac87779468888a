"""Laws of the fast leave-one-out scores: equal to taking blocks out one by one, races won by the right block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.importance.ablation import Ablation
from iskd.importance.racing import Race, Racing, coarsening, race, student_t
from iskd.importance.sweep import PrefixCache, leave_one_out_rows, leave_one_out_values
from iskd.models import Stack, scoring, surgery
from iskd.plan import Convert, Record, Remove, Replace, Spec
from tests.factories import FAMILIES, hooks, silence, tiny, windows

BATCHES = [windows(3, 16, seed=1), windows(2, 13, seed=2)]
WIDTHS = (1, 3, 8)


def edited(teacher: PreTrainedModel) -> PreTrainedModel:
    """A student with a gap, two compact blocks and a mixer in place of an attention."""
    student = copy.deepcopy(teacher)
    bottleneck = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 3, "zero_up": False})
    slim = Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})
    mixer = Spec("iskd.mixers.linear_attention.LinearAttention")
    edits = (Replace(0, bottleneck), Remove(1), Replace(3, slim), Convert(4, mixer))
    surgery.apply(student, Record(6), edits)
    return student.eval()


@torch.no_grad()
def one_by_one(student: PreTrainedModel, teacher: PreTrainedModel, metric: str, stride: int) -> Tensor:
    """Scores [L, W] of students that really lack the block, from whole logits."""
    count = len(Stack(student).layers)
    rows = []
    for position in range(count):
        short = copy.deepcopy(student)
        surgery.apply(short, Record(count), [Remove(position)])
        row = []
        for window in (batch[index : index + 1] for batch in BATCHES for index in range(len(batch))):
            p, whole, q = (model(window).logits[0].double().log_softmax(-1) for model in (teacher, student, short))
            if metric == "kl":
                tokens = (p.exp() * (p - q)).sum(-1)
            else:
                tokens = (whole - q)[:-1].gather(1, window[0, 1:, None])[:, 0]
            row.append(tokens[::stride].mean())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sweep_equals_taking_out_one_block_after_the_other(family: str) -> None:
    teacher = tiny(family, layers=6)
    student = edited(teacher)
    for metric in ("kl", "loss"):
        for stride in (1, 4):
            naive = one_by_one(student, teacher, metric, stride)
            for width in WIDTHS:
                with scoring(student, teacher):
                    rows = leave_one_out_rows(
                        student, teacher, BATCHES, metric=metric, stride=stride, width=width, chunk=7
                    )
                assert rows.dtype == torch.float32
                torch.testing.assert_close(rows.double(), naive, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attn_implementation": "eager"}),  # masks are tensors, one row per window
        ("gpt2", {"attn_implementation": "eager"}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),  # masks differ by block
    ],
)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_stacked_branches_get_the_right_masks(family: str, options: dict[str, object], batch: int) -> None:
    model = tiny(family, layers=6, **options)
    ids = windows(batch, 16)  # as many windows as tokens, too
    with scoring(model):
        alone, *stacked = (leave_one_out_values(model, model, ids, width=width) for width in WIDTHS)
    assert (alone > 1e-6).any()
    for values in stacked:
        torch.testing.assert_close(values, alone, atol=1e-6, rtol=0)


def test_logits_are_soft_capped_as_the_model_caps_them() -> None:
    teacher = tiny("llama", layers=6)
    teacher.config.final_logit_softcapping = 0.1
    plain = copy.deepcopy(teacher)
    plain.config.final_logit_softcapping = None
    capped, uncapped = (Ablation(1)(model, model, BATCHES) for model in (teacher, plain))
    assert (capped < uncapped).all()


@torch.no_grad()
def test_under_autocast_only_the_logits_are_in_half_precision() -> None:
    teacher = tiny("llama", layers=6)
    student = edited(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        for metric in ("kl", "loss"):
            rows = leave_one_out_rows(student, teacher, BATCHES, metric=metric, width=1)
            torch.testing.assert_close(rows.double(), one_by_one(student, teacher, metric, 1), atol=5e-5, rtol=0)


def test_candidates_are_scored_in_the_order_given_and_alone() -> None:
    teacher = tiny("llama", layers=6)
    with scoring(teacher):
        whole = leave_one_out_values(teacher, teacher, BATCHES[0])
        for width in WIDTHS:
            some = leave_one_out_values(teacher, teacher, BATCHES[0], candidates=[4, 0, 2], width=width)
            torch.testing.assert_close(some, whole[[4, 0, 2]], atol=1e-6, rtol=0)


def calls(model: PreTrainedModel, score: Callable[[], object]) -> int:
    """Times that a block of the model computed while `score` ran."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    # the MLP runs only when the block does
    handles = [b.get_submodule("mlp").register_forward_hook(counted) for b in Stack(model).layers]
    score()
    for handle in handles:
        handle.remove()
    return count


def test_only_blocks_above_a_missing_one_are_run_again() -> None:
    student, teacher = (tiny("llama", layers=6, seed=seed) for seed in (0, 1))
    batch = BATCHES[0]

    def score(**options: object) -> Callable[[], object]:
        return lambda: leave_one_out_values(student, teacher, batch, **options)  # type: ignore[arg-type]

    with scoring(student, teacher):
        assert calls(student, score(width=1)) == 5 + 15
        # what lies above the last candidate is no part of the trunk
        assert calls(student, score(candidates=[2, 1], width=1)) == 2 + 3 + 4
        assert calls(student, score(candidates=[2, 1], width=2)) == 2 + 4
        assert calls(student, score(metric="loss", candidates=[2], width=1)) == 2 + 4 + 3


def test_a_student_that_is_still_the_teacher_spares_the_teachers_pass() -> None:
    teacher = tiny("llama", layers=6)
    student, other = copy.deepcopy(teacher), copy.deepcopy(teacher)
    with torch.no_grad():
        next(Stack(other).layers[5].parameters()).view(-1)[3] += 1e-6
    results = []

    def score(student: PreTrainedModel) -> None:
        results.append(leave_one_out_values(student, teacher, BATCHES[0], width=3, candidates=[1, 4]))

    with scoring(student, teacher, other):
        assert calls(teacher, lambda: score(student)) == 0
        assert calls(teacher, lambda: score(other)) == 6
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
    assert (results[0] > 1e-4).any()


def changed(student: PreTrainedModel, how: str) -> int:
    """Change something and return how many blocks lie below it."""
    layers = Stack(student).layers
    if how == "optimizer":
        parameters = list(layers[3].parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
        return 3
    if how == "remove":
        surgery.apply(student, Record(6), [Remove(4)])
        return 4
    if how == "convert":
        surgery.apply(student, Record(6), [Convert(2, Spec("iskd.mixers.linear_attention.LinearAttention"))])
        return 2
    if how == "data":
        next(layers[1].parameters()).data.view(-1)[5] += 1e-3
        return 1
    if how == "load":
        student.load_state_dict({key: value * 1.1 for key, value in student.state_dict().items()})
        return 0
    if how == "embedding":
        with torch.no_grad():
            student.get_input_embeddings().weight.mul_(1.5)
        return 0
    return 5


@pytest.mark.parametrize("how", ["nothing", "optimizer", "data", "remove", "convert", "load", "embedding"])
@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_remembered_states_hold_up_to_the_first_change(how: str, metric: str) -> None:
    teacher = tiny("llama", layers=6)
    student = copy.deepcopy(teacher)
    remembering, fresh = Ablation(metric=metric), Ablation(metric=metric, cache_mb=0)
    before = remembering.rows(student, teacher, BATCHES)
    spared = len(BATCHES) * changed(student, how)
    saved = calls(student, lambda: fresh.rows(student, teacher, BATCHES)) - calls(
        student, lambda: remembering.rows(student, teacher, BATCHES)
    )
    assert saved == spared
    after = remembering.rows(student, teacher, BATCHES)
    assert torch.equal(after, fresh.rows(student, teacher, BATCHES))
    assert torch.equal(after, before) == (how == "nothing")
    assert hooks(student) == 0
    assert not any("forward" in vars(block) for block in Stack(student).layers)


def test_what_is_remembered_depends_on_windows_and_precision_and_has_a_limit() -> None:
    model = tiny("llama", layers=6)
    cache, other = PrefixCache(1), copy.deepcopy(model)
    long = windows(64, 64)

    def cost(ids: Tensor, of: PreTrainedModel = model) -> int:
        return calls(of, lambda: cache.trunk(Stack(of), ids, 5))

    with torch.no_grad():
        assert cost(BATCHES[0]) == 5
        assert cost(BATCHES[0].clone()) == 0
        assert cost(BATCHES[1]) == 5
        assert cost(long) == cost(long) == 5  # does not fit
        assert cost(BATCHES[0]) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert cost(BATCHES[0]) == 5
        assert cost(BATCHES[0], other) == 5


def planted(values: Tensor, spread: float, seed: int = 0, tokens: int = 8) -> Callable[..., list[Tensor]]:
    """A measure whose block i costs values[i]; windows and tokens are hard or easy for all blocks alike."""
    generator = torch.Generator().manual_seed(seed)
    hard = 5 * torch.randn(64, 1, tokens, generator=generator)
    own = spread * torch.randn(64, len(values), tokens, generator=generator)
    table = values[:, None] + hard + own

    def measure(candidates: Sequence[int], start: int, stop: int, stride: int) -> list[Tensor]:
        measure.cost += len(candidates) * (stop - start)  # type: ignore[attr-defined]
        return [table[window][list(candidates)][:, ::stride] for window in range(start, stop)]

    measure.cost, measure.table = 0, table  # type: ignore[attr-defined]
    return measure


def run(measure: Callable[..., list[Tensor]], count: int, *, stride: int = 1, z: float = 2.0) -> Race:
    return race(measure, list(range(count)), 64, stride=stride, first=2, growth=2, z=z)


def test_clear_cases_end_early_and_pairing_sees_through_shared_noise() -> None:
    measure = planted(torch.tensor([3.0, 1.0, 2.0, 4.0]), spread=0.01)
    result = run(measure, 4)
    assert result.left == [1]
    assert result.rounds == [(2, 1, 4)]
    assert measure.cost == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(5))
def test_the_winner_is_that_of_the_full_scores(seed: int) -> None:
    values = 1 + torch.rand(12, generator=torch.Generator().manual_seed(seed))
    measure = planted(values, spread=0.5, seed=seed, tokens=16)
    for stride in (1, 2):
        measure.cost = 0  # type: ignore[attr-defined]
        result = run(measure, 12, stride=stride, z=3.0)
        full = measure.table[:, :, ::stride].double().mean((0, 2))  # type: ignore[attr-defined]
        assert result.left[0] == full.argmin()
        assert min(result.scores, key=result.scores.__getitem__) == result.left[0]
        assert set(result.scores) == set(range(12))
        assert measure.cost < 0.8 * 12 * 64  # type: ignore[attr-defined]
        if len(result.left) > 1:  # all windows were read, at the last stride
            for position in result.left:
                assert result.scores[position] == pytest.approx(full[position].item(), abs=1e-6)
                assert len(result.rows[position]) == 64


@pytest.mark.parametrize("number", [2, 3, 12])
@pytest.mark.parametrize("seed", range(3))
def test_as_many_winners_as_are_asked_for_are_those_of_the_full_scores(seed: int, number: int) -> None:
    values = 1 + torch.rand(12, generator=torch.Generator().manual_seed(seed))
    measure = planted(values, spread=0.5, seed=seed, tokens=16)
    result = race(measure, range(12), 64, stride=1, first=2, growth=2, z=3.0, number=number)
    full = measure.table.double().mean((0, 2))  # type: ignore[attr-defined]
    winners = set(sorted(result.scores, key=result.scores.__getitem__)[:number])
    assert winners == set(full.argsort()[:number].tolist())
    assert winners <= set(result.left)
    if number == 12:  # nothing to decide but the order: everything is read
        assert [result.scores[i] for i in range(12)] == pytest.approx(full.tolist(), abs=1e-6)


def test_the_race_is_among_those_who_may_go() -> None:
    """A block that may not go does not end the race by winning it."""
    teacher = tiny("llama", layers=6)
    silence(teacher, 0)
    full = Ablation(1)(teacher, teacher, BATCHES)
    scores = Racing().choosing([1, 2, 3, 4, 5], 2, range(6))(teacher, teacher, BATCHES)
    assert set(scores.argsort()[:2].tolist()) == set((full[1:].argsort()[:2] + 1).tolist())
    assert scores.argmax() == 0, "it did not race"


def test_nobody_is_put_out_without_evidence() -> None:
    same = planted(torch.ones(3), spread=0.0)
    assert run(same, 3).left == [0, 1, 2]
    assert len(run(planted(torch.rand(5), spread=0.5), 5, z=1e9).left) == 5


@pytest.mark.parametrize(
    ("z", "freedom", "t"),
    [(1.2816, 1, 3.078), (1.2816, 2, 1.886), (1.2816, 5, 1.476), (1.96, 5, 2.571), (1.96, 30, 2.042), (1e9, 5, 1e9)],
)
def test_few_windows_need_more_evidence(z: float, freedom: int, t: float) -> None:
    assert student_t(z, freedom) == pytest.approx(t, rel=1e-3)


def test_fewer_blocks_are_scored_at_more_positions() -> None:
    assert [coarsening(left) for left in (1, 3, 5, 6, 11, 12, 23, 24, 100)] == [1, 1, 1, 2, 2, 4, 4, 8, 8]
    result = run(planted(torch.ones(7), spread=0.0), 7, stride=2)
    assert result.rounds == [(2, 4, 7), (4, 4, 7), (8, 4, 7), (16, 4, 7), (32, 4, 7), (64, 4, 7)]


def test_windows_are_cut_into_equal_pieces() -> None:
    batches = [torch.arange(44).view(2, 22), torch.arange(7)[None]]
    first, second = Racing(tokens=7).cut(batches)
    assert first.tolist() == [[*range(start, start + 7)] for start in (0, 7, 14, 22, 29, 36)], "22 = 3 x 7 + 1"
    assert torch.equal(second, batches[1])
    assert torch.equal(Racing(tokens=None).cut(batches)[0], batches[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_does_nothing_wins_the_race(family: str) -> None:
    teacher = tiny(family, layers=6)
    silence(teacher, 3)
    scores = Racing()(teacher, teacher, BATCHES)
    assert scores.argmin() == 3
    assert scores.isfinite().all()
    assert (scores.sort().values[1:] > scores[3]).all()


def test_of_two_blocks_that_do_nothing_either_wins() -> None:
    teacher = tiny("llama", layers=6)
    silence(teacher, 1)
    silence(teacher, 4)
    scores = Racing()(teacher, teacher, BATCHES)
    assert set(scores.argsort()[:2].tolist()) == {1, 4}
    torch.testing.assert_close(scores[[1, 4]], torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_those_left_have_the_scores_of_ablation(metric: str) -> None:
    teacher = tiny("llama", layers=6)
    student = edited(teacher)
    racing = Racing(metric=metric, stride=2, z=1e9)
    ablation = Ablation(2, metric)
    torch.testing.assert_close(
        racing(student, teacher, BATCHES), ablation(student, teacher, BATCHES), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        racing.rows(student, teacher, BATCHES), ablation.rows(student, teacher, BATCHES), atol=1e-6, rtol=0
    )


def test_blocks_that_are_out_cost_nothing_more() -> None:
    teacher = tiny("llama", layers=6)
    silence(teacher, 4)
    batches = list(windows(16, 16).split(3))
    racing = Racing(cache_mb=0, width=1, z=1.0)
    result = racing.race(teacher, teacher, batches)[0]
    assert result.left == [4]
    assert result.rounds == [(1, 2, 6)]
    # the scout's pass and one window for all and for the whole student; the other fifteen windows are never read
    student = copy.deepcopy(teacher)
    assert calls(student, lambda: racing(student, teacher, batches)) == 6 + (5 + 15 + 1)
    rows = racing.rows(teacher, teacher, batches)
    assert rows[4, :1].isfinite().all()
    assert rows[4, 1:].isnan().all()
    assert rows[[0, 1, 2, 3, 5]].isnan().all()


class Sink(nn.Module):
    """A block that makes an outlier of position 0, and of no other."""

    def forward(self, h_BTD: Tensor, *_: object, **__: object) -> Tensor:
        first = torch.zeros_like(h_BTD)
        first[:, 0] = 1000.0
        return h_BTD + first + 1e-3 * h_BTD.roll(1, -1)


def test_a_block_that_builds_the_sink_does_not_race() -> None:
    teacher = tiny("llama", layers=6)
    Stack(teacher).set_layers([*list(Stack(teacher).layers)[:2], Sink(), *list(Stack(teacher).layers)[3:]])
    result, _ = Racing().race(teacher, teacher, BATCHES)
    assert set(result.scores) == {0, 1, 3, 4, 5}
    assert Racing()(teacher, teacher, BATCHES).argmax() == 2


def test_one_window_is_enough_to_run() -> None:
    teacher = tiny("llama", layers=6)
    scores = Racing()(teacher, teacher, [windows(1, 16)])
    assert scores.argmin() == Ablation()(teacher, teacher, [windows(1, 16)]).argmin()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ablation(metric="accuracy"), r"importance.metric='accuracy' is unknown: choose kl or loss"),
        (lambda: Ablation(width=0), r"importance.width must be at least 1, got 0"),
        (lambda: Ablation(cache_mb=-1), r"importance.cache_mb must not be negative, got -1"),
        (lambda: Racing(stride=0), r"importance.stride must be at least 1, got 0"),
        (lambda: Racing(tokens=1), r"importance.tokens must be at least 2, got 1"),
        (lambda: Racing(pieces=0), r"importance.pieces must be at least 1, got 0"),
        (lambda: Racing(growth=0.5), r"importance.growth must be at least 1, got 0.5"),
        (lambda: Racing(z=-1), r"importance.z must not be negative, got -1"),
        (lambda: Racing(veto=1), r"importance.veto must be above 1 .*got 1"),
    ],
)
def test_bad_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"cannot leave out blocks \[4\]: the stack holds blocks 0\.\.3"):
        leave_one_out_values(model, model, BATCHES[0], candidates=[4])
    with pytest.raises(ValueError, match=r"cannot leave out blocks \[\]"):
        leave_one_out_values(model, model, BATCHES[0], candidates=[])
    with pytest.raises(ValueError, match=r"at least 2 tokens, got a batch \[2, 1\]"):
        leave_one_out_values(model, model, windows(2, 1), metric="loss")
    with pytest.raises(ValueError, match=r"at least 2 tokens, got a batch \[1, 1\]"):
        Racing()(model, model, [windows(2, 1)])

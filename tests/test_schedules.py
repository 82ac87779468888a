"""Laws of schedules: every layer once, every token spent, nothing remembered."""

from __future__ import annotations

from typing import Any

import pytest

from iskd.plan import Record, Remove, Replace, Spec, Stage
from iskd.schedules.base import History, RemoveLayers, ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.schedules.none import NoEdits
from iskd.schedules.oneshot import Oneshot
from iskd.schedules.orders import NAMES, ordered

REPLACE = ReplaceWith(Spec("iskd.blocks.linear.Linear"))
REMOVE = RemoveLayers()
GPT2 = [5, 7, 3, 9, 1, 11, 2, 10, 4, 8, 6, 0]
PHI1 = [9, 1, 19, 15, 14, 7, 17, 8, 10, 11, 13, 20, 0, 4, 12, 18, 6, 21, 5, 2, 23, 3, 16, 22]


def play(schedule: Any, num_layers: int = 8, scores: list[dict[int, float]] | None = None) -> list[Stage]:
    """All stages of a run; `scores[i]` is what the layers score before stage i, the last entry from then on."""
    record, stages = Record(num_layers), list[Stage]()
    while True:
        seen = None if scores is None else scores[min(len(stages), len(scores) - 1)]
        history = History(record, tuple(stages), seen)
        stage = schedule.next_stage(history)
        assert stage == schedule.next_stage(history), "same history, same stage"
        if stage is None:
            return stages
        record = record.extended(stage.edits)
        stages.append(stage)


def layers(stages: list[Stage]) -> list[int]:
    return [edit.layer for stage in stages for edit in stage.edits]


def flat(num_layers: int) -> dict[int, float]:
    return dict.fromkeys(range(num_layers), 0.0)


@pytest.mark.parametrize("edit", [REPLACE, REMOVE])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("per_stage", [1, 2, 3, 9])
@pytest.mark.parametrize("order", ["middle_out", "alternate", "importance"])
def test_stages_cover_the_target_exactly_once(edit: Any, count: int, per_stage: int, order: str) -> None:
    stages = play(Iterative(edit, count=count, per_stage=per_stage, order=order), scores=[flat(8)])
    done = layers(stages)
    assert len(done) == len(set(done)) == count
    assert done == ordered(order, 8, flat(8))[:count]
    assert [len(stage.edits) for stage in stages[:-1]] == [per_stage] * (len(stages) - 1)
    assert 1 <= len(stages[-1].edits) <= per_stage


@pytest.mark.parametrize("tokens", [0, 1, 7, 100, 61_440])
@pytest.mark.parametrize("final_share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize(("count", "per_stage"), [(1, 1), (5, 1), (7, 2), (6, 3)])
def test_budgets_sum_to_the_tokens(tokens: int, final_share: float, count: int, per_stage: int) -> None:
    schedule = Iterative(
        REMOVE, count=count, per_stage=per_stage, tokens=tokens, final_share=final_share, order="middle_out"
    )
    budgets = [stage.tokens for stage in play(schedule)]
    assert sum(budgets) == tokens
    assert min(budgets) >= 0
    assert len(set(budgets[:-1])) <= 1
    assert budgets[-1] == max(budgets)
    if len(budgets) > 1:
        assert budgets[-1] - budgets[0] == pytest.approx(tokens * final_share, abs=len(budgets))


def test_the_published_orders_are_played_as_published() -> None:
    assert layers(play(Iterative(REPLACE, count=12, order="gpt2_paper"), num_layers=12)) == GPT2
    assert layers(play(Iterative(REPLACE, count=24, order="phi1_paper"), num_layers=24)) == PHI1
    assert sorted(GPT2) == list(range(12))
    assert sorted(PHI1) == list(range(24))


@pytest.mark.parametrize("num_layers", [1, 2, 5, 8, 12])
def test_every_order_names_every_layer_once(num_layers: int) -> None:
    for name in ("middle_out", "alternate", "importance"):
        assert sorted(ordered(name, num_layers, flat(num_layers))) == list(range(num_layers)), name


def test_orders_that_are_computed() -> None:
    assert ordered("middle_out", 5) == [2, 1, 3, 0, 4]
    assert ordered("middle_out", 4) == [1, 2, 0, 3]
    assert ordered("alternate", 6) == [3, 1, 5, 2, 4, 0]
    half = sorted(ordered("alternate", 12)[:6])
    assert half == [1, 3, 5, 7, 9, 11], "no two compact blocks meet before the half"
    assert ordered("importance", 4, {0: 0.2, 1: 0.1, 2: 0.2, 3: 0.0}) == [3, 1, 0, 2], "ties go to the lower layer"


def test_a_list_of_layers_is_the_order() -> None:
    assert layers(play(Iterative(REPLACE, layers=[6, 0, 3]))) == [6, 0, 3]
    assert layers(play(Iterative(REPLACE, layers=[6, 0, 3], count=2, order="nonsense"))) == [6, 0]
    assert Iterative(REPLACE, layers=[6]).scoring == "never"


def test_protected_layers_are_never_edited() -> None:
    stages = play(Iterative(REMOVE, count=5, protect=[0, 3, 7], order="middle_out"))
    assert layers(stages) == [4, 2, 5, 1, 6]


def test_scores_are_asked_for_only_when_they_are_used() -> None:
    assert Iterative(REPLACE, count=1).scoring == "once"
    assert Iterative(REPLACE, count=1, rescore=True).scoring == "each"
    assert Iterative(REPLACE, count=1, rescore=True, order="alternate").scoring == "never"
    assert Oneshot(REPLACE, count=1).scoring == "once"
    assert Oneshot(REPLACE, count=-1, order="middle_out").scoring == "never"
    assert NoEdits().scoring == "never"


def test_each_stage_follows_the_scores_of_its_time() -> None:
    scores = [{0: 3.0, 1: 1.0, 2: 2.0, 3: 4.0}, {0: 1.0, 2: 2.0, 3: 0.5}, {0: 0.1, 2: 0.0}]
    assert layers(play(Iterative(REMOVE, count=3, rescore=True), 4, scores)) == [1, 3, 2]
    # a replaced block is scored too, and never edited again
    scores = [{0: 3.0, 1: 1.0, 2: 2.0}, {0: 3.0, 1: 0.0, 2: 2.0}]
    assert layers(play(Iterative(REPLACE, count=3, rescore=True), 3, scores)) == [1, 2, 0]


def test_a_stage_says_what_trains_and_how() -> None:
    schedule = Iterative(REPLACE, count=2, per_stage=2, order="middle_out", train="new", lr=0.5, lr_new=0.25, seed=3)
    [stage] = play(schedule)
    assert (stage.train, stage.lr, stage.lr_new, stage.fit) == ("new", 0.5, 0.25, True)
    assert stage.name == "replace 3, 4"
    assert stage.edits == (Replace(3, REPLACE.block, 30_024), Replace(4, REPLACE.block, 30_025))
    [stage] = play(Iterative(REMOVE, count=1, layers=[2]))
    assert stage.edits == (Remove(2),)
    assert not stage.fit
    assert play(Iterative(ReplaceWith(REPLACE.block, fit=False), layers=[2]))[0].fit is False


def test_fresh_weights_depend_on_run_seed_and_layer_alone() -> None:
    def seeds(seed: int, order: list[int]) -> dict[int, int]:
        stages = play(Iterative(REPLACE, layers=order, seed=seed))
        return {edit.layer: edit.seed for stage in stages for edit in stage.edits if isinstance(edit, Replace)}

    assert seeds(1, [4, 2, 6]) == seeds(1, [6, 4, 2])
    assert not set(seeds(1, [4, 2, 6]).values()) & set(seeds(2, [4, 2, 6]).values())


@pytest.mark.parametrize("count", [1, 5, 8])
def test_oneshot_edits_all_at_once_with_the_whole_budget(count: int) -> None:
    [stage] = play(Oneshot(REPLACE, count=count, tokens=101, order="middle_out", floor=0.5))
    assert [edit.layer for edit in stage.edits] == ordered("middle_out", 8)[:count]
    assert stage.tokens == 101
    assert Oneshot(REPLACE, count=count, floor=0.5).floor == 0.5


@pytest.mark.parametrize("protect", [(), (0, 7), (0, 0, 7)])
def test_oneshot_minus_one_edits_every_layer_that_is_not_protected(protect: tuple[int, ...]) -> None:
    [stage] = play(Oneshot(REPLACE, count=-1, protect=protect, tokens=9), scores=[flat(8)])
    assert [edit.layer for edit in stage.edits] == [layer for layer in range(8) if layer not in protect]
    assert stage.tokens == 9


def test_oneshot_takes_a_list_of_layers() -> None:
    assert layers(play(Oneshot(REMOVE, layers=[5, 1]))) == [5, 1]


def test_no_edits_is_one_stage_of_training() -> None:
    [stage] = play(NoEdits(tokens=5, train="edited", lr=0.1))
    assert stage == Stage("finetune", tokens=5, train="edited", lr=0.1, lr_new=0.1, fit=False)
    assert NoEdits().floor is None


@pytest.mark.parametrize("schedule", [Iterative, Oneshot])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"schedule.count=None: nothing would be edited; give at least 1 \(-1 = all\), or use schedule=none"),
        ({"count": 0}, "schedule.count=0: nothing would be edited"),
        ({"count": -2}, "schedule.count=-2: nothing would be edited"),
        ({"layers": []}, "schedule.count=0: nothing would be edited"),
        ({"count": 1, "order": "backwards"}, "schedule.order='backwards' is unknown; choose one of gpt2_paper"),
        ({"count": 1, "tokens": -1}, "schedule.tokens must be >= 0"),
        *[({"count": 1, "floor": floor}, r"schedule.floor must be in \(0, 1\]") for floor in (0, -0.1, 1.01, 95)],
    ],
)
def test_values_that_cannot_work_are_refused_at_once(schedule: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(REPLACE, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"count": 1, "per_stage": 0}, "schedule.per_stage must be at least 1, got 0"),
        ({"count": 1, "final_share": 1.0}, r"schedule.final_share in \[0, 1\), got"),
        ({"count": 1, "final_share": -0.1}, r"schedule.final_share in \[0, 1\), got"),
    ],
)
def test_values_of_iterative_alone(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Iterative(REPLACE, **kwargs)


def test_no_edits_and_no_tokens_is_no_run() -> None:
    with pytest.raises(ValueError, match=r"schedule.tokens=0: nothing would be edited or trained"):
        NoEdits(tokens=0)


@pytest.mark.parametrize("schedule", [Iterative, Oneshot])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"count": 9, "order": "middle_out"}, "schedule.count=9, but only 8 layers may be edited"),
        (
            {"count": 6, "order": "middle_out", "protect": [0, 1, 7]},
            r"schedule.count=6, but only 5 layers may be edited \(protected: \[0, 1, 7\]\)",
        ),
        ({"layers": [3, 8]}, r"schedule.layers names layer 8; the teacher has layers 0\.\.7"),
        ({"layers": [-1]}, "schedule.layers names layer -1"),
        ({"layers": [2, 5, 2]}, "schedule.layers lists layer 2 twice"),
        ({"layers": [2, 5], "protect": [5]}, "schedule.count=2, but only 1 layers may be edited"),
        ({"layers": [2], "protect": [8]}, "schedule.protect names layer 8"),
        (
            {"count": 1, "order": "gpt2_paper"},
            "schedule.order=gpt2_paper was published for 12 layers, the teacher has 8",
        ),
        ({"count": 1, "order": "phi1_paper"}, "schedule.order=phi1_paper was published for 24 layers"),
        ({"count": 1}, "schedule.order=importance needs scores; choose one with importance="),
    ],
)
def test_targets_that_do_not_fit_the_teacher_are_refused(schedule: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        play(schedule(REPLACE, **kwargs))


def test_removing_the_last_layer_is_refused_by_the_record() -> None:
    with pytest.raises(ValueError, match="it is the last layer"):
        play(Iterative(REMOVE, count=3, order="middle_out"), num_layers=3)


def test_minus_one_with_every_layer_protected_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be edited"):
        play(Oneshot(REPLACE, count=-1, order="middle_out", protect=range(8)))


def test_minus_one_counts_only_layers_that_exist() -> None:
    with pytest.raises(ValueError, match=r"schedule.protect names layer 99"):
        play(Oneshot(REPLACE, count=-1, order="middle_out", protect=[99]))


def test_an_unknown_order_names_the_known() -> None:
    with pytest.raises(ValueError, match=rf"choose one of {', '.join(NAMES)}"):
        ordered("sideways", 4)

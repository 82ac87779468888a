"""Laws of schedules: every layer once, every token spent, nothing remembered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from iskd.plan import Record, Remove, Replace, Spec, Stage
from iskd.plan.edits import Merge
from iskd.schedules import History, Schedule, next_stage
from iskd.schedules.edits import ConvertTo, MergeLayers, RemoveLayers, ReplaceWith
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
        stage = next_stage(schedule, history)
        assert stage == next_stage(schedule, history), "same history, same stage"
        assert schedule.complete(history) == (stage is None) == (not schedule.candidates_for(history))
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
@pytest.mark.parametrize("final_share", [0.0, 0.3, 1.0])
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


@pytest.mark.parametrize(("final_share", "untrained"), [(0.0, [0, 0, 0]), (0.5, [0, 0, 0]), (1.0, [0, 1, 2])])
def test_what_no_stage_has_trained_is_new_to_the_next_one(final_share: float, untrained: list[int]) -> None:
    stages = play(Iterative(REPLACE, count=3, tokens=30, final_share=final_share, order="middle_out"))
    assert [stage.untrained for stage in stages] == untrained
    record = Record(8).extended(edit for stage in stages for edit in stage.edits)
    assert stages[-1].fresh(record) == record.edits[-1 - untrained[-1] :]


@pytest.mark.parametrize(("share", "per_stage"), [(0.0, 1), (0.25, 2), (1.0, 1)])
def test_the_last_edit_is_refitted_on_all_text(share: float, per_stage: int) -> None:
    schedule = Iterative(REMOVE, count=4, per_stage=per_stage, refit_share=share, order="middle_out")
    stages = play(schedule)
    assert [stage.refit_share for stage in stages] == [share] * (len(stages) - 1) + [1.0]


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


def test_a_choice_of_layers_by_name() -> None:
    assert sorted(layers(play(Iterative(REPLACE, layers="every_second", order="middle_out")))) == [1, 3, 5, 7]
    assert layers(play(Iterative(REPLACE, layers="every_second", count=2, order="middle_out"))) == [3, 5]
    assert layers(play(Oneshot(REPLACE, layers="all", protect=[0], order="middle_out"))) == [3, 4, 2, 5, 1, 6, 7]
    assert Iterative(REPLACE, layers="every_second").scoring == "once"
    with pytest.raises(ValueError, match=r"schedule.layers='odd' is unknown; choose all, every_second or a list"):
        Iterative(REPLACE, layers="odd")


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


@pytest.mark.parametrize("edit", [REPLACE, REMOVE])
@pytest.mark.parametrize("rescore", [True, False])
def test_edits_stay_side_by_side(edit: Any, rescore: bool) -> None:
    """The lowest layer first, then the lower one of the two beside, whatever the others score."""
    scores = {0: 0.1, 1: 5.0, 2: 2.0, 3: 0.0, 4: 1.0, 5: 3.0, 6: 0.2, 7: 0.3}
    schedule = Iterative(edit, count=4, rescore=rescore, contiguous=True)
    assert layers(play(schedule, 8, [scores])) == [3, 4, 2, 5]
    asked = schedule.choice(History(Record(8).extended([edit.make(3, 0)]), (), scores))
    assert set(asked.layers) == ({2, 4} if rescore else set(range(8)) - {3})
    assert layers(play(Iterative(edit, count=4, rescore=rescore, contiguous=True, protect=(2,)), 8, [scores])) == [
        3,
        4,
        5,
        6,
    ]
    with pytest.raises(ValueError, match=r"the layers beside 3 to 4 may not be edited"):
        play(Iterative(edit, count=4, rescore=rescore, contiguous=True, protect=(2, 5)), 8, [scores])


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
        ({"count": 1, "final_share": 1.1}, r"schedule.final_share in \[0, 1\], got"),
        ({"count": 1, "refit_share": 1.5}, r"schedule.refit_share must be in \[0, 1\], got 1.5"),
        ({"count": 1, "final_share": -0.1}, r"schedule.final_share in \[0, 1\], got"),
        ({"count": 2, "per_stage": 2, "contiguous": True}, "contiguous=true takes one layer at a time"),
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
            r"schedule.count=6, but only 5 layers may be edited \(protected or left out: \[0, 1, 7\]\)",
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


def test_minus_one_with_every_layer_edited_before_is_refused() -> None:
    record = Record(4).extended(REPLACE.make(layer, 0) for layer in range(4))
    history = History(record, before=4)
    with pytest.raises(ValueError, match=r"every layer is protected or was edited before \(a list in schedule"):
        next_stage(Oneshot(REMOVE, count=-1, order="middle_out"), history)


def test_minus_one_with_every_layer_protected_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be edited"):
        play(Oneshot(REPLACE, count=-1, order="middle_out", protect=range(8)))


def test_minus_one_counts_only_layers_that_exist() -> None:
    with pytest.raises(ValueError, match=r"schedule.protect names layer 99"):
        play(Oneshot(REPLACE, count=-1, order="middle_out", protect=[99]))


def test_an_unknown_order_names_the_known() -> None:
    with pytest.raises(ValueError, match=rf"choose one of {', '.join(NAMES)}"):
        ordered("sideways", 4)


# Removal to a depth or a size.


def survivors(stages: list[Stage], num_layers: int) -> int:
    return num_layers - len(layers(stages))


@pytest.mark.parametrize("schedule", [Iterative, Oneshot])
@pytest.mark.parametrize("target", [1, 5, 7])
@pytest.mark.parametrize("order", ["middle_out", "alternate", "importance"])
def test_a_target_depth_is_met_exactly_and_is_a_count_by_another_name(schedule: Any, target: int, order: str) -> None:
    to_depth = play(schedule(REMOVE, target_layers=target, order=order, tokens=101), scores=[flat(8)])
    assert survivors(to_depth, 8) == target
    assert to_depth == play(schedule(REMOVE, count=8 - target, order=order, tokens=101), scores=[flat(8)])


@pytest.mark.parametrize(("per_stage", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (9, [5])])
def test_several_layers_are_removed_at_once(per_stage: int, sizes: list[int]) -> None:
    stages = play(Iterative(REMOVE, target_layers=3, per_stage=per_stage, tokens=77), scores=[flat(8)])
    assert [len(stage.edits) for stage in stages] == sizes
    assert sum(stage.tokens for stage in stages) == 77


def test_a_target_depth_takes_a_list_as_its_order() -> None:
    assert layers(play(Iterative(REMOVE, layers=[6, 0, 3], target_layers=6))) == [6, 0]


def sized(params: dict[int, int], other: int = 10) -> History:
    return History(Record(len(params)), scores=dict.fromkeys(params, 0.0), params=params, other_params=other)


def play_from(schedule: Any, history: History) -> History:
    """The history at the end of a run, walked as a forecast walks it."""
    while (stage := next_stage(schedule, history)) is not None:
        history = history.after(stage)
    return history


@pytest.mark.parametrize("per_stage", [1, 2, None])
@pytest.mark.parametrize(("target", "left"), [(89, 7), (70, 6), (61, 5), (60, 5), (59, 4), (20, 1)])
def test_a_target_size_is_met_by_the_fewest_removals(target: int, left: int, per_stage: int | None) -> None:
    schedule = Iterative(REMOVE, target_params=target, per_stage=per_stage, tokens=101)
    end = play_from(schedule, sized(dict.fromkeys(range(8), 10)))
    assert len(end.record.layers) == left
    assert sum(stage.tokens for stage in end.stages) == 101
    assert len({stage.tokens for stage in end.stages[:-1]}) <= 1


def test_blocks_of_several_sizes_count_as_what_they_are() -> None:
    sizes = {0: 50, 1: 1, 2: 1, 3: 1, 4: 50}
    # 113 parameters: the three small ones are not enough for 100, so the walk goes on to a large one
    end = play_from(Iterative(REMOVE, target_params=100, layers=[1, 2, 3, 4, 0], tokens=7), sized(sizes))
    assert end.record.layers == (0,)
    assert sum(stage.tokens for stage in end.stages) == 7
    assert end.params == {0: 50}
    assert play_from(Iterative(REMOVE, target_params=100, layers=[4, 1, 2]), sized(sizes)).record.layers == (0, 1, 2, 3)


@pytest.mark.parametrize("flips", [0, 1, 2, 3])
def test_budgets_sum_up_when_new_scores_change_the_number_of_stages(flips: int) -> None:
    """Small blocks go first for `flips` stages, then the large one, which ends the run early."""
    sizes = {0: 40, 1: 10, 2: 10, 3: 10, 4: 10, 5: 10}
    schedule = Iterative(REMOVE, target_params=60, rescore=True, tokens=100, final_share=0.3)
    history = sized(sizes)
    while True:
        left = history.params or {}
        sign = 1 if len(history.stages) < flips else -1
        scores = {layer: float(sign * size) for layer, size in left.items()}
        stage = next_stage(schedule, replace(history, scores=scores))
        if stage is None:
            break
        history = history.after(stage)
    assert sum(stage.tokens for stage in history.stages) == 100
    assert min(stage.tokens for stage in history.stages) >= 0
    assert 10 + sum((history.params or {}).values()) <= 60


def test_the_history_after_a_stage_holds_what_is_left() -> None:
    history = sized({0: 3, 1: 4, 2: 5})
    stage = Stage("remove 1", (Remove(1),))
    after = history.after(stage)
    assert after.record.layers == (0, 2)
    assert after.stages == (stage,)
    assert after.params == {0: 3, 2: 5}
    assert (after.scores, after.other_params) == (history.scores, 10)
    assert History(Record(2)).after(Stage("heal")).params is None


# Protection.


@pytest.mark.parametrize("order", ["middle_out", "alternate", "importance"])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (0, 2), (2, 1), (3, 3)])
def test_both_ends_are_protected_beside_the_list(order: str, first: int, last: int) -> None:
    ends = {*range(first), *range(8 - last, 8)}
    settings: dict[str, Any] = {"protect": [4], "protect_first": first, "protect_last": last, "order": order}
    stages = play(Iterative(REMOVE, count=-1, **settings), scores=[flat(8)])
    assert set(layers(stages)) == set(range(8)) - ends - {4}


@pytest.mark.parametrize("scores", [{layer: float(layer) for layer in range(8)}, {layer: -layer for layer in range(8)}])
def test_the_lowest_scores_go_first_where_they_may(scores: dict[int, float]) -> None:
    done = layers(play(Iterative(REMOVE, target_layers=4, protect_first=2, protect_last=1), scores=[scores]))
    assert done == sorted(range(2, 7), key=lambda layer: scores[layer])[:4]


# Candidates.


@pytest.mark.parametrize("per_stage", [1, 2, 3])
@pytest.mark.parametrize("asked", [1, 2, 4, 99])
def test_candidates_are_sorted_distinct_and_differ_in_one_layer(per_stage: int, asked: int) -> None:
    scores = {0: 0.5, 1: 0.2, 2: 0.9, 3: 0.1, 4: 0.8, 5: 0.3, 6: 0.7, 7: 0.0}
    more = {"candidates": asked, "trial_tokens": 5} if asked > 1 else {}
    schedule = Iterative(REMOVE, count=6, per_stage=per_stage, tokens=60, protect=[7], **more)  # type: ignore[arg-type]
    history = History(Record(8), scores=scores)
    found = schedule.candidates_for(history)
    assert found[0] == next_stage(schedule, history)
    assert found[0] == next_stage(Iterative(REMOVE, count=6, per_stage=per_stage, tokens=60, protect=[7]), history)
    assert len(found) == min(asked, 7 - per_stage + 1)
    assert len({stage.edits for stage in found}) == len({stage.name for stage in found}) == len(found)
    costs = [sum(scores[edit.layer] for edit in stage.edits) for stage in found]
    assert costs == sorted(costs)
    assert {len(stage.edits) for stage in found} == {per_stage}
    assert {stage.edits[:-1] for stage in found} == {found[0].edits[:-1]}
    assert {stage.tokens for stage in found} == {60 * per_stage // 6}
    assert not any(edit.layer == 7 for stage in found for edit in stage.edits)


def test_any_candidate_may_be_taken_and_the_run_still_ends_where_it_should() -> None:
    schedule = Iterative(REMOVE, target_layers=3, candidates=3, trial_tokens=8, tokens=50)
    history = History(Record(8), scores={layer: float(layer) for layer in range(8)})
    while found := schedule.candidates_for(history):
        history = history.after(found[-1])
    assert history.record.layers == (0, 1, 7)
    assert sum(stage.tokens for stage in history.stages) == 50


def test_one_shot_candidates_and_the_control_without_edits() -> None:
    found = Oneshot(REMOVE, target_layers=6, order="middle_out", candidates=3, trial_tokens=1).candidates_for(
        History(Record(8))
    )
    assert [[edit.layer for edit in stage.edits] for stage in found] == [[3, 4], [3, 2], [3, 5]]
    control: Schedule = NoEdits(tokens=5)
    history = History(Record(8))
    assert control.candidates_for(history) == [next_stage(control, history)]
    assert control.complete(history.after(Stage("finetune", tokens=5)))


def test_whether_a_run_is_complete_needs_no_scores() -> None:
    schedule = Iterative(REMOVE, target_layers=7, rescore=True)
    history = History(Record(8))
    assert not schedule.complete(history)
    assert schedule.complete(history.after(Stage("remove 3", (Remove(3),))))


# Errors of removals.


@pytest.mark.parametrize("schedule", [Iterative, Oneshot])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target_layers": 0}, "schedule.target_layers=0 must be at least 1"),
        ({"target_layers": -3}, "schedule.target_layers=-3 must be at least 1"),
        ({"target_params": 0}, "schedule.target_params=0 must be at least 1"),
        (
            {"count": 4, "target_layers": 26},
            "schedule.count=4 and schedule.target_layers=26 are two targets; keep one: set schedule.count=null",
        ),
        ({"count": 4, "target_params": 9}, "schedule.count=4 and schedule.target_params=9 are two targets"),
        ({"target_layers": 4, "target_params": 9}, "schedule.target_layers=4 and schedule.target_params=9 are two"),
        ({"count": 1, "protect_first": -1}, "schedule.protect_first and protect_last must be >= 0 layers, got -1"),
        ({"count": 1, "protect_last": -2}, "schedule.protect_first and protect_last must be >= 0 layers, got 0 and -2"),
        ({"count": 1, "candidates": 0}, "schedule.candidates=0 and schedule.trial_tokens=0 do not fit"),
        ({"count": 1, "candidates": 3}, "schedule.candidates=3 and schedule.trial_tokens=0 do not fit"),
        ({"count": 1, "trial_tokens": 8}, "schedule.candidates=1 and schedule.trial_tokens=8 do not fit"),
    ],
)
def test_removals_that_cannot_work_are_refused_at_once(schedule: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(REMOVE, **kwargs)


def test_merges_are_removals_that_spare_the_lowest_layer() -> None:
    schedule = Iterative(MergeLayers(ridge=0.5), target_layers=6, layers=[2, 1, 3], tokens=0)
    assert schedule.removes
    assert [stage.edits for stage in play(schedule)] == [(Merge(2, 0.5),), (Merge(1, 0.5),)]
    assert all(stage.fit for stage in play(schedule))
    with pytest.raises(ValueError, match=r"only 2 layers may be edited \(protected or left out: \[0\]\)"):
        play(Iterative(MergeLayers(), layers=[1, 0, 2], tokens=0))
    with pytest.raises(ValueError, match=r"edit.fit=false: layers are merged by a fit; use edit=remove"):
        MergeLayers(fit=False)


@pytest.mark.parametrize("edit", [REPLACE, ConvertTo(Spec("iskd.mixers.linear_attention.LinearAttention"))])
@pytest.mark.parametrize("target", ["target_layers", "target_params"])
def test_a_depth_or_a_size_is_for_removals(edit: Any, target: str) -> None:
    with pytest.raises(
        ValueError, match=rf"schedule.{target}=4 is for edit=remove and edit=merge; .* with schedule.count"
    ):
        Iterative(edit, **{target: 4})


@pytest.mark.parametrize("schedule", [Iterative, Oneshot])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target_layers": 8}, "schedule.target_layers=8: the model has only 8 layers, so nothing would be removed"),
        ({"target_layers": 26}, "schedule.target_layers=26: the model has only 8 layers"),
        ({"target_params": 90}, "schedule.target_params=90: the model has only 90 parameters"),
        (
            {"target_layers": 2, "protect_first": 2, "protect_last": 2},
            r"schedule.target_layers=2, but only 4 layers may be edited \(protected or left out: \[0, 1, 6, 7\]\)",
        ),
        ({"target_layers": 4, "protect": range(8)}, "schedule.target_layers=4, but only 0 layers may be edited"),
        ({"target_layers": 4, "protect_last": 40}, "schedule.target_layers=4, but only 0 layers may be edited"),
        ({"count": -1, "protect_first": 5, "protect_last": 3}, "every layer is protected: nothing would be edited"),
        (
            {"target_params": 19},
            "schedule.target_params=19 cannot be reached: 20 parameters are left .* 10 of them outside the blocks",
        ),
        ({"target_params": 60, "protect_first": 6}, "schedule.target_params=60 cannot be reached: 70 parameters"),
    ],
)
def test_depths_and_sizes_that_do_not_fit_are_refused(schedule: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next_stage(schedule(REMOVE, **kwargs), sized(dict.fromkeys(range(8), 10)))


def test_a_size_needs_the_sizes_of_the_blocks() -> None:
    with pytest.raises(ValueError, match=r"schedule.target_params=60 needs the sizes of the blocks.*target_layers"):
        next_stage(Iterative(REMOVE, target_params=60), History(Record(8), scores=flat(8)))

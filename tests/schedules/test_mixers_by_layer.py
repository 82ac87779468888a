"""Two mixers in one student: which layer gets which, from the command line to the edits."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from iskd.commands.build.schedule import edit_of
from iskd.commands.compose import compose_config
from iskd.commands.values import as_meant
from iskd.models import Stack, surgery
from iskd.plan import Convert, Record, Remove, Spec, to_json
from iskd.plan.reading import record_from_json
from iskd.schedules import ConvertTo, History
from iskd.schedules.align import Align
from iskd.schedules.edits import RemoveLayers, ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.schedules.mixed import Mixed, Step, in_vain, refuse_in_vain
from iskd.schedules.oneshot import Oneshot
from iskd.training.deciding import check_edits
from tests.factories import mixer_specs, tiny
from tests.laws import check_cache, check_generation

SPECS = mixer_specs()
WINDOW, MLSTM, GLA = (SPECS[name] for name in ("window", "mlstm", "gla"))


def steps(first: dict[str, Any], second: dict[str, Any], schedule: Any) -> Mixed:
    """A removal and another step, as they were written."""
    return Mixed([Step(Oneshot(RemoveLayers(), layers=[0])), Step(schedule)], [first, second])


def mixers_of(edit: Any, depth: int = 6) -> list[Spec]:
    return [edit.make(layer, 0).mixer for layer in range(depth)]


def test_layers_get_the_mixer_that_names_them() -> None:
    edit = ConvertTo(WINDOW, {"mlstm": (MLSTM, "odd"), "gla": (GLA, [0, 4])})
    assert mixers_of(edit) == [GLA, MLSTM, WINDOW, MLSTM, GLA, MLSTM]
    assert edit.every == [WINDOW, MLSTM, GLA]
    [stage] = Oneshot(edit, count=-1, order="middle_out").candidates_for(History(Record(6)))
    assert {e.layer: e.mixer for e in stage.edits if isinstance(e, Convert)} == dict(enumerate(mixers_of(edit)))


def test_a_student_with_both_hosts_both() -> None:
    model, edit = tiny("llama"), ConvertTo(WINDOW, {"mlstm": (MLSTM, "odd")})
    record = surgery.apply(model, Record(4), [edit.make(layer, 0) for layer in range(4)])
    kinds = [type(block.self_attn.mixer).__name__ for block in Stack(model).layers]  # type: ignore[union-attr]
    assert kinds == ["Sliding", "MLSTM"] * 2
    check_cache(model.double())
    check_generation(model, (9, 7))
    assert record_from_json(to_json(record)) == record


def test_the_command_line_names_them() -> None:
    config, _ = compose_config(
        ["edit=convert", "mixer=window", "edit.mixers={mlstm:{layers:odd,memory:64},gla:[0]}", "mixer.window=16"]
    )
    edit = edit_of(config)
    assert isinstance(edit, ConvertTo)
    kinds = [spec.target.rpartition(".")[2] for spec in mixers_of(edit, 4)]
    assert kinds == ["GLA", "MLSTM", "Sliding", "MLSTM"]
    assert (edit.make(1, 0).mixer.kwargs["memory"], edit.make(2, 0).mixer.kwargs["window"]) == (64, 16)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{mlstm:odd,gla:[1]}", "edit.mixers names layer 1 for mlstm and for gla: a layer has one mixer"),
        ("{mlstm:[2],gla:[2]}", "names layer 2 for mlstm and for gla"),
        ("{mlstm:even,gla:even}", "names layer 0 for mlstm and for gla"),
        ("{mlstm:[1,1]}", "names layer 1 twice for mlstm"),
        ("{mlstm:third}", "say which layers, as a list or as even or odd"),
        ("{mlstm:[]}", "give at least one layer"),
        ("{mlstm:{memory:64}}", "say which layers"),
        ("{mlstm:{layers:odd,temper:2}}", "mlstm has no key 'temper'; it has memory, "),
        ("{mlstm:{layers:odd,_target_:a.B}}", "mlstm has no key '_target_'"),
        ("{lstm:odd}", "edit.mixers has no mixer 'lstm': choose among"),
        ("mlstm", "give mixers by name with their layers"),
    ],
)
def test_what_cannot_be_is_refused(value: str, message: str) -> None:
    config, _ = compose_config(["edit=convert", "mixer=window", f"edit.mixers={value}"])
    with pytest.raises(ValueError, match=message):
        edit_of(config)


@pytest.mark.parametrize("place", ["edit.mixers", "schedule.steps[0].edit.mixers"])
def test_values_of_their_keys_are_read_under_their_own_names(place: str) -> None:
    def asked(value: object) -> list[str]:
        mixers = f"{{mlstm:{{layers:odd,memory:{value}}}}}"
        if place == "edit.mixers":
            return ["edit=convert", "mixer=window", f"edit.mixers={mixers}"]
        step = f"{{edit:{{name:convert,mixers:{mixers}}},mixer:window}}"
        return ["schedule=mixed", "schedule.tokens=256", f"schedule.steps=[{step}]"]

    with pytest.raises(ValueError, match=rf"^{re.escape(place)}\.mlstm\.memory=abc must be a finite number"):
        as_meant(compose_config(asked("abc"))[0])
    as_meant(compose_config(asked(64))[0])


def test_a_layer_beyond_the_teacher_is_refused() -> None:
    schedule = Align(ConvertTo(WINDOW, {"mlstm": (MLSTM, [1, 9])}), mixers=None, hidden=False)
    with pytest.raises(ValueError, match=r"names layer 9; the teacher has layers 0\.\.5"):
        schedule.candidates_for(History(Record(6)))


@pytest.mark.parametrize(
    ("kind", "keys", "named", "said"),
    [
        (Oneshot, {"layers": [0, 1, 2]}, [1, 3], "layer 3 would not be converted; those that are converted: 0, 1, 2"),
        (Oneshot, {"layers": [0, 2]}, "odd", "layers that are odd would not be converted; those .*: 0, 2"),
        (Oneshot, {"layers": "every_second", "order": "middle_out"}, "even", r"those that are converted: 1, 3, 5"),
        (Oneshot, {"count": -1, "protect": [3]}, [3], "layer 3 would not .*: 0, 1, 2, 4, 5"),
        (
            Oneshot,
            {"count": -1, "protect_first": 1, "protect_last": 1},
            [0, 2, 5],
            "layer 0, 5 would not .*: 1, 2, 3, 4",
        ),
        (Oneshot, {"count": 2, "order": "middle_out"}, [2, 4], "layer 4 would not .*: 2, 3"),
        (Iterative, {"count": 2, "order": "middle_out", "tokens": 8}, "even", None),
        (Iterative, {"count": 2, "order": "middle_out", "tokens": 8}, [1], "layer 1 would not .*: 2, 3"),
        (Iterative, {"count": 2, "contiguous": True, "order": "middle_out"}, [4], None),
        (Align, {"layers": [1, 4]}, [1, 2], "layer 2 would not .*: 1, 4"),
        (Align, {"protect": [5]}, [5], "layer 5 would not"),
        (Align, {"attention_share": 0.5, "protect": [0]}, [0], "layer 0 would not .*: 1, 2, 3, 4, 5"),
        (Align, {"attention_share": 0.5}, [0, 1, 2, 3], None),
    ],
)
def test_a_mixer_for_layers_that_are_not_converted_is_refused(
    kind: Any, keys: dict[str, Any], named: Any, said: str | None
) -> None:
    """Before anything is scored: of layers that scores choose, those that they may choose count."""
    schedule, history = kind(ConvertTo(WINDOW, {"gla": (GLA, named)}), **keys), History(Record(6))
    with nullcontext() if said is None else pytest.raises(ValueError, match=rf"edit.mixers=\{{gla: .*{said}"):
        refuse_in_vain(schedule, history)


def test_layers_that_are_gone_count_for_no_mixer() -> None:
    convert = ConvertTo(WINDOW, {"gla": (GLA, [2, 4])})
    by_hand, scored = Oneshot(RemoveLayers(), layers=[2]), Oneshot(RemoveLayers(), count=1)
    rest = Align(convert)
    with pytest.raises(ValueError, match="layer 2 would not be converted; those that are converted: 0, 1, 3, 4, 5"):
        refuse_in_vain(Mixed([Step(by_hand), Step(rest)]), History(Record(6)))
    refuse_in_vain(Mixed([Step(scored), Step(rest)]), History(Record(6)))
    # of a student that a run goes on from, too
    with pytest.raises(ValueError, match="layer 2 would not be converted"):
        refuse_in_vain(Oneshot(convert, count=2), History(Record(6, (Remove(2),))))
    assert in_vain(rest, History(Record(6, (Remove(2), Remove(4))), before=2)).startswith("edit.mixers={gla: [2, 4]}")
    assert not in_vain(rest, History(Record(6, (Remove(2),)), before=1))


def test_scores_that_choose_no_layer_of_a_mixer_are_told() -> None:
    scores = {layer: float(layer) for layer in range(6)}
    for named, vain in (([3, 4], True), ([1, 4], False), ("odd", False)):
        schedule = Align(ConvertTo(WINDOW, {"gla": (GLA, named)}), count=2, order="importance")
        refuse_in_vain(schedule, History(Record(6)))
        said = in_vain(schedule, History(Record(6), scores=scores))
        assert bool(said) == vain
        assert not vain or said.endswith(
            "those that are converted: 0, 1. Name some of these, or drop what is named in vain"
        )


BAD_WINDOW = replace(SPECS["mlstm_window"], kwargs={**SPECS["mlstm_window"].kwargs, "window": 2, "sinks": 3})
BAD_HEADS = replace(GLA, kwargs={**GLA.kwargs, "heads": 5})
LARGE = Spec("iskd.blocks.slim.Slim", {"ratio": 1.5})


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (
            Align(ConvertTo(GLA, {"mlstm_window": (BAD_WINDOW, "odd")})),
            "edit.mixers.mlstm_window.sinks=3 is more than edit.mixers.mlstm_window.window=2: .* set "
            "edit.mixers.mlstm_window.sinks to 2 or less",
        ),
        (Align(ConvertTo(WINDOW, {"gla": (BAD_HEADS, [3])})), "edit.mixers.gla.heads=5 does not divide"),
        # the layers that stand-ins for scores choose have none of it
        (Oneshot(ConvertTo(WINDOW, {"gla": (BAD_HEADS, [3])}), count=1), "edit.mixers.gla.heads=5 does not divide"),
        (Align(ConvertTo(BAD_HEADS, {"window": (WINDOW, [3])})), "mixer.heads=5 does not divide"),
        (steps({}, {"mixer": {}}, Align(ConvertTo(BAD_HEADS))), r"schedule.steps\[1\].mixer.heads=5 does not divide"),
        (steps({}, {}, Align(ConvertTo(BAD_HEADS))), "mixer.heads=5 does not divide"),
        (
            steps({}, {"mixer": {}}, Align(ConvertTo(WINDOW, {"gla": (BAD_HEADS, "odd")}))),
            r"schedule.steps\[1\].edit.mixers.gla.heads=5 does not divide",
        ),
        (steps({"block": {}}, {}, Oneshot(ReplaceWith(LARGE), layers=[3])), "block.ratio must be in"),
        (
            steps({}, {"block": {}}, Oneshot(ReplaceWith(LARGE), layers=[3])),
            r"schedule.steps\[1\].block.ratio must be in",
        ),
    ],
)
def test_what_a_part_says_of_its_keys_is_told_as_they_were_written(schedule: Any, said: str) -> None:
    teacher = tiny("llama")
    with pytest.raises(ValueError, match=f"^{said}"):
        check_edits(schedule, teacher, History(Record(4), scores=dict.fromkeys(range(4), 0.0)))


def test_matrices_are_aligned_where_all_mixers_have_one() -> None:
    for other, objective in (("gla", "matrix"), ("mamba", "mixer_output")):
        schedule = Align(ConvertTo(WINDOW, {other: (SPECS[other], "odd")}), mixers="auto", tokens=1000)
        assert schedule.stages[0].objective == objective

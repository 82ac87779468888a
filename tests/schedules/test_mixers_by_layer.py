"""Two mixers in one student: which layer gets which, from the command line to the edits."""

from __future__ import annotations

import re
from typing import Any

import pytest

from iskd.commands.build.schedule import edit_of
from iskd.commands.compose import compose_config
from iskd.commands.values import as_meant
from iskd.models import Stack, surgery
from iskd.plan import Convert, Record, Spec, to_json
from iskd.plan.reading import record_from_json
from iskd.schedules import ConvertTo, History
from iskd.schedules.align import Align
from iskd.schedules.oneshot import Oneshot
from tests.factories import mixer_specs, tiny
from tests.laws import check_cache, check_generation

SPECS = mixer_specs()
WINDOW, MLSTM, GLA = (SPECS[name] for name in ("window", "mlstm", "gla"))


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


def test_matrices_are_aligned_where_all_mixers_have_one() -> None:
    for other, objective in (("gla", "matrix"), ("mamba", "mixer_output")):
        schedule = Align(ConvertTo(WINDOW, {other: (SPECS[other], "odd")}), mixers="auto", tokens=1000)
        assert schedule.stages[0].objective == objective

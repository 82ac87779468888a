"""What a refit cannot do is refused before a run scores or edits anything, by each refit's own check."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from iskd.data import TextData
from iskd.losses import of_sizes
from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.losses.kl_sum import FinalState
from iskd.models import Stack, surgery
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec, Stage
from iskd.plan.edits import Merge
from iskd.refits import Refit, RefitTask
from iskd.refits.calibrate import Calibrate
from iskd.refits.carrying_out import check_refits, check_sizes
from iskd.refits.local import Local
from iskd.refits.magnitude import Magnitude
from iskd.refits.output import Output
from iskd.refits.replaceme import ReplaceMe
from iskd.refits.values import Values
from iskd.system import Ranks
from iskd.training import run
from iskd.training.editing import Editor
from iskd.training.plan_table import Costs, plan_rows
from iskd.training.stages import StageLoop
from tests.conf_defaults import CONF
from tests.factories import BEHIND, FAMILIES, digest, louder, mixer_specs, text_of, tiny, windows
from tests.runs import Scripted, make_parts, write_text

KINDS: dict[str, type[Refit]] = {
    "output": Output,
    "local": Local,
    "magnitude": Magnitude,
    "replaceme": ReplaceMe,
    "calibrate": Calibrate,
    "values": Values,
}
CLOSED = ("output", "replaceme", "values")
# a model whose norms stand behind the sums, of a family whose norms otherwise stand in front
AFTER = {"do_layer_norm_before": False}
TEXT = list(windows(20, 16).split(4))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, "opt 350m"])
def test_norms_behind_the_sums_are_refused_by_name(family: str, name: str) -> None:
    model = tiny(family.split()[0], **(AFTER if "350m" in family else {}))
    refused = name in CLOSED if family in BEHIND else False
    refused |= name == "magnitude" and family == "olmo2"
    refused |= family == "opt 350m" and name in (*CLOSED, "magnitude")
    refit = KINDS[name]()
    if refused:
        with pytest.raises(ValueError, match=rf"refit={name} .*{model.config.model_type}.*norm.*: use refit=local"):
            check_refits([refit], model, [Remove(1)], text_of(TEXT, refit), Ranks())
    else:
        check_refits([refit], model, [Remove(1)], text_of(TEXT, refit), Ranks())


@torch.no_grad()
@pytest.mark.parametrize("edit", [Remove(2), Replace(0, Spec("iskd.blocks.identity.Identity"), seed=1)])
@pytest.mark.parametrize("projections", [("mlp",), ("attention",), ("attention", "mlp")])
@pytest.mark.parametrize("blocks", ["gaps", "above", "all"])
def test_no_choice_of_blocks_gets_past_them(blocks: str, projections: Sequence[str], edit: Edit) -> None:
    teacher = louder(tiny("opt", **AFTER))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [edit])
    refit = Output(tokens=160, held_tokens=64, blocks=blocks, projections=projections)
    if not any(layer in refit.chosen(task_of(made, teacher, record, edit)) for layer in record.layers if layer):
        return  # the block at the compact one's own place has nothing to solve
    with pytest.raises(ValueError, match=r"a norm stands behind it.*use refit=local"):
        refit.refit(task_of(made, teacher, record, edit))


def task_of(made: Any, teacher: Any, record: Record, edit: Edit) -> RefitTask:
    return RefitTask(made, teacher, record, [edit], TEXT[:4], TEXT[4:])


def test_magnitude_says_in_a_sentence_what_it_cannot_do() -> None:
    teacher = louder(tiny("opt", **AFTER))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [Remove(2)])
    with pytest.raises(ValueError, match=r"refit=magnitude makes the stream larger, .*of opt read.*use refit=local"):
        Magnitude().refit(task_of(made, teacher, record, Remove(2)))


SLIM = Spec("iskd.blocks.slim.Slim", {"ratio": 0.5})
LINEAR = Spec("iskd.blocks.linear.Linear", {})


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "edits", "said"),
    [
        (
            Magnitude,
            [Replace(0, LINEAR, seed=1), Remove(2)],
            r"magnitude .*the block at layer 0 is a compact or conver",
        ),
        (Magnitude, [Convert(1, mixer_specs()["gla"], seed=1), Remove(2)], r"magnitude .*the block at layer 1 is a"),
        (Magnitude, [Merge(2)], "no layer was removed but by a merge: nothing to scale"),
        (Magnitude, [Replace(3, LINEAR, seed=1), Replace(0, SLIM, seed=1), Remove(2)], ""),
        (Magnitude, [Merge(3), Remove(1)], ""),
        (ReplaceMe, [Replace(1, LINEAR, seed=1), Remove(2)], r"replaceme .*of layer 1, where a compact block without"),
        (ReplaceMe, [Replace(0, SLIM, seed=1), Replace(1, SLIM, seed=1), Remove(2)], ""),
        (ReplaceMe, [Convert(1, mixer_specs()["gla"], seed=1), Remove(2)], ""),
    ],
)
def test_blocks_that_a_refit_cannot_go_by_are_told(kind: type[Refit], edits: Sequence[Edit], said: str) -> None:
    """Which layers they are turns out in a run, whose training so far is not lost for them."""
    teacher = louder(tiny("llama"))
    kind().check(Stack(teacher), edits)
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), edits)
    before = digest(made)
    task = RefitTask(made, teacher, record, edits, TEXT[:4], TEXT[4:])
    more = {"ridge": 1e-3} if kind is ReplaceMe else {}
    [told] = kind(tokens=160, held_tokens=64, **more).refit(task)
    assert bool(said) == bool(re.search(said or "nothing|compact", told))
    assert (digest(made) == before) == bool(said)


@pytest.mark.parametrize(
    ("stages", "states", "said"),
    [
        ([(Stage("a", (Remove(1),)), [Magnitude(), Output()])], [], "refit=output"),
        (
            [(Stage("a", (Remove(1),)), [Local(), Magnitude()]), (Stage("b", (Remove(2),)), [Local()])],
            [],
            "refit=local",
        ),
        ([(Stage("a", (Remove(1),), 64), [Magnitude()])], ["hidden"], "loss=hidden"),
        ([(Stage("a", (Remove(1),)), [Magnitude()]), (Stage("b", (), 64, objective="hidden"), [])], [], "stage 'b'"),
        (
            [(Stage("a", (Remove(1),)), [Magnitude()]), (Stage("b", (Replace(2, SLIM, seed=1),)), [])],
            [],
            r"the fit of blocks \(edit\.fit\)",
        ),
        (
            [(Stage("a", (Remove(1),)), [Magnitude()]), (Stage("b", (Merge(2),), fit=False), [])],
            [],
            r"the fit of blocks \(edit\.fit\)",
        ),
        ([(Stage("a", (Remove(1),)), [Magnitude()]), (Stage("b", (Replace(2, SLIM, seed=1),), fit=False), [])], [], ""),
        ([(Stage("a", (Remove(1),)), [Magnitude()]), (Stage("b", (), 64, objective="matrix"), [])], [], ""),
        ([(Stage("a", (Remove(1),), 64), [Output(), Magnitude()]), (Stage("b", (Remove(2),)), [Magnitude()])], [], ""),
        ([(Stage("a", (Convert(1, SLIM, seed=1),)), [Magnitude(), Output()])], [], ""),
        ([(Stage("a", (Remove(1),), 64), [Output(), Local()])], ["hidden"], ""),
    ],
)
def test_nothing_aims_at_the_teachers_states_once_the_stream_has_another_size(
    stages: Any, states: Sequence[str], said: str
) -> None:
    if said:
        with pytest.raises(
            ValueError, match=rf"refit=magnitude makes the stream .*, and {said} would aim at states of"
        ):
            check_sizes(stages, states)
    else:
        check_sizes(stages, states)


def test_a_run_whose_losses_aim_at_states_refuses_magnitude(tmp_path: Path) -> None:
    parts = make_parts(
        tmp_path / "run",
        write_text(tmp_path),
        tmp_path / "cache",
        schedule=Scripted([Stage("remove 1", (Remove(1),), tokens=64, fit=False)]),
        refits=(Magnitude(tokens=64, held_tokens=32),),
        terms={"hidden": (HiddenMatch(layers="all"), 1.0)},
    )
    with pytest.raises(ValueError, match=r"refit=magnitude .* and loss=hidden would aim at"):
        run(parts)


@pytest.mark.parametrize(
    ("loss", "untied", "tied"),
    [
        (HiddenMatch(layers="all"), True, True),
        (HiddenMatch("normalized", layers=[0, 2]), True, True),
        (HiddenMatch(), False, False),  # above every cut the stream has the teacher's size
        (HiddenMatch("cosine", layers="stage"), False, False),
        (FinalState(), False, True),
        (KL(), False, False),
    ],
)
def test_losses_that_compare_sizes(loss: Any, untied: bool, tied: bool) -> None:
    assert [bool(of_sizes({"x": (loss, 1.0)}, tied=one)) for one in (False, True)] == [untied, tied]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_halves_that_are_trained_apart_are_counted_and_told_where_there_are_none(family: str) -> None:
    teacher = louder(tiny(family))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [Remove(2)])
    for inputs in ("student", "teacher"):
        refit = Local(tokens=160, held_tokens=64, epochs=2, sublayers=True, inputs=inputs)
        told = refit.refit(task_of(made, teacher, record, Remove(2)))
        assert any("blocks were trained whole (sublayers)" in line for line in told) == (family == "phi")
        assert (refit.passes, Local(epochs=2).passes) == (10.0, 8.0)


def test_mixers_without_linear_values_are_refused_where_all_are_such() -> None:
    teacher, gla = tiny("llama"), Convert(1, mixer_specs()["gla"], seed=3)
    sliding = Convert(2, Spec("iskd.mixers.sliding.Sliding", {"window": 3, "sinks": 1}), seed=3)
    with pytest.raises(ValueError, match=r"refit=values: .*leave values out of refit"):
        Values().check(Stack(teacher), [gla])
    Values().check(Stack(teacher), [gla, sliding])


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 4)])
def test_too_few_windows_are_refused(count: int, size: int) -> None:
    ranks: Any = Ranks()
    ranks.size = size
    for kind in KINDS.values():
        with pytest.raises(ValueError, match=rf"{count} calibration windows .*refit_share.*data\.calibration_fraction"):
            check_refits([kind()], tiny("llama"), [Remove(1)], text_of([windows(count, 16)], kind(), least=size), ranks)


def test_a_run_is_refused_before_its_first_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage whose refit reads too little is the last one."""

    def measured(*_: Any) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr(StageLoop, "_measure", measured)
    monkeypatch.setattr(TextData, "calibration", lambda *_: [windows(1, 32)])
    stages = [
        Stage("remove 1", (Remove(1),), tokens=64, lr=1e-3, fit=False, refit_share=0),
        Stage("remove 2", (Remove(2),), tokens=64, lr=1e-3, fit=False),
    ]
    parts = make_parts(
        tmp_path / "run",
        write_text(tmp_path),
        tmp_path / "cache",
        schedule=Scripted(stages),
        refits=(Output(tokens=16, held_tokens=16),),
    )
    with pytest.raises(ValueError, match=r"refit\.output: 1 calibration windows of 32 tokens"):
        run(parts)


def test_the_plan_counts_what_a_refit_reads_and_its_judge() -> None:
    """A step is four passes: those of the refit over the text that there is, and three over the text held out."""
    refit = Output(tokens=320, held_tokens=80)
    for there, share in ((400, 1.0), (192, 0.48)):
        editor = Editor([refit], lambda tokens, there=there: [windows(min(tokens, there) // 16, 16)])
        stage = Stage("remove 1", (Remove(1),), tokens=64, refit_share=0.25)
        costs = Costs(token=2.0, refit_tokens=editor.refit_tokens_of)
        row = plan_rows(tiny("llama"), [stage], [1], 64, costs)[1]
        assert row["refit_seconds"] == pytest.approx(2.0 * 0.25 * share * (400 * refit.passes + 3 * 80) / 4)


def test_the_plan_counts_one_walk_for_all_fits_of_a_stage() -> None:
    """A step is four passes: one of either model, and some of its block for every fit; of the text that there is."""
    edits = (Replace(4, SLIM, seed=1), Merge(2), Remove(6))
    stage = Stage("all", edits, tokens=64, fit=True)
    for there, read in ((1000, 400), (192, 192)):
        editor = Editor([], lambda tokens, there=there: [windows(min(tokens, there) // 16, 16)], fit_tokens=320)
        costs = Costs(token=2.0, fit_tokens=partial(editor.fit_tokens_of, depth=8))
        asked = {"two": stage, "none": replace(stage, fit=False), "removed": replace(stage, edits=edits[2:])}
        seconds = {
            name: plan_rows(tiny("llama", layers=8), [each], [1], 64, costs)[1]["fit_seconds"]
            for name, each in asked.items()
        }
        assert seconds == {"two": pytest.approx(2.0 * read * (2 + 4 * 2 / 8) / 4), "none": 0, "removed": 0}


@pytest.mark.parametrize("name", KINDS)
def test_a_yaml_shows_every_key(name: str) -> None:
    shown = yaml.safe_load((CONF / "refit" / f"{name}.yaml").read_text())[name]
    assert {key for key in shown if key != "_target_"} == {field.name for field in fields(KINDS[name])}

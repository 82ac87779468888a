"""What a refit cannot do is refused before a run scores or edits anything, by each refit's own check."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from iskd.models import Stack, surgery
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec, Stage
from iskd.refits import Refit, RefitTask
from iskd.refits.calibrate import Calibrate
from iskd.refits.carrying_out import check_refits
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
from tests.factories import BEHIND, FAMILIES, louder, mixer_specs, tiny, windows
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
            check_refits([refit], model, [Remove(1)], lambda _: TEXT, Ranks())
    else:
        check_refits([refit], model, [Remove(1)], lambda _: TEXT, Ranks())


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
            check_refits([kind()], tiny("llama"), [Remove(1)], lambda _: [windows(count, 16)], ranks)


def test_a_run_is_refused_before_its_first_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage whose refit reads too little is the last one."""

    def measured(*_: Any) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr(StageLoop, "_measure", measured)
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


@pytest.mark.parametrize("name", KINDS)
def test_a_yaml_shows_every_key(name: str) -> None:
    shown = yaml.safe_load((CONF / "refit" / f"{name}.yaml").read_text())[name]
    assert {key for key in shown if key != "_target_"} == {field.name for field in fields(KINDS[name])}

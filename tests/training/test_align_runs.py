"""The recipe of alignment: its stages, and whole runs on tiny models."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iskd.models import Stack, surgery
from iskd.plan import Convert, Record, Stage, to_json
from iskd.plan.reading import stage_from_json
from iskd.schedules import History, next_stage
from iskd.schedules.align import Align
from iskd.schedules.edits import ConvertTo, RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.training.parts import Parts
from iskd.training.runner import run
from iskd.training.step import OptimSpec
from tests import programs
from tests.factories import mixer_specs, tiny
from tests.runs import TOKENS, At, Crash, crash, make_parts, same, weights, write_text
from tests.worlds import World, run_world

GLA = mixer_specs()["gla"]


def test_a_stage_says_what_it_optimises() -> None:
    stage = Stage("a", (Convert(1, GLA),), 5, objective="matrix", shape="wsd")
    assert stage_from_json(json.loads(json.dumps(to_json(stage)))) == stage
    for key, known in (("objective", "'loss', 'matrix', 'mixer_output', 'hidden'"), ("shape", "'wsd'")):
        for value in ("steep", 3, None, ["matrix"]):
            with pytest.raises(ValueError, match=rf"Stage 'a': {key} must be (a string|one of .*{known})"):
                stage_from_json({"name": "a", key: value})


def test_the_shape_of_a_rate_belongs_to_its_stage() -> None:
    spec = OptimSpec(decay="cosine", warmup=0.1)
    rates = [spec.scale(step, 100, 500, 9000, "wsd") for step in range(100)]
    assert rates == [spec.scale(step, 100, 0, 100, "wsd") for step in range(100)], "whatever comes before and after"
    assert rates[0] < 0.1
    assert rates[10:91] == pytest.approx([1.0] * 81)
    assert rates[91:] == pytest.approx([0.1 * n for n in range(9, 0, -1)])
    assert spec.scale(50, 100, 500, 9000, "linear") == pytest.approx(0.5)
    assert spec.scale(50, 100, 0, 100, "") == spec.scale(50, 100, 0, 100) == pytest.approx(0.5)
    assert OptimSpec(decay="wsd", warmup=0.0).scale(95, 100, 0, 100) == pytest.approx(0.5)


def stages(num_layers: int = 8, scores: dict[int, float] | None = None, **settings: Any) -> list[Stage]:
    """Every stage of a schedule."""
    schedule, history, found = Align(ConvertTo(GLA), **settings), History(Record(num_layers), scores=scores), []
    while (stage := next_stage(schedule, history)) is not None:
        assert next_stage(schedule, history) == stage
        found.append(stage)
        history = history.after(stage)
    assert schedule.complete(history)
    return found


def test_the_recipe_is_the_published_one() -> None:
    first, second, third = stages(tokens=1_000_000)
    assert [s.tokens for s in (first, second, third)] == [26_000, 53_000, 921_000]
    assert [s.objective for s in (first, second, third)] == ["matrix", "hidden", "loss"]
    assert [(s.lr, s.lr_new, s.shape) for s in (first, second, third)] == [
        (2e-4, 2e-4, "wsd"),
        (2e-3, 2e-3, "wsd"),
        (3e-4, 3e-4, "linear"),
    ]
    assert [s.train for s in (first, second, third)] == ["new", "edited", "all"]
    assert [edit.layer for edit in first.edits] == list(range(8))
    assert not second.edits + third.edits


@pytest.mark.parametrize("mixers", ["matrix", "mixer_output", None, False, "off"])
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("tokens", [0, 7, 999, 12_345])
def test_a_technique_that_is_off_leaves_its_tokens_to_the_last_stage(mixers: Any, hidden: bool, tokens: int) -> None:
    found = stages(mixers=mixers, hidden=hidden, tokens=tokens)
    assert sum(stage.tokens for stage in found) == tokens
    asked = [mixers] * bool(mixers and mixers != "off") + ["hidden"] * hidden
    asked = [*asked, "loss"] if tokens > 7 else ["loss"]  # no stage without a token
    assert [stage.objective for stage in found] == asked
    assert [len(stage.edits) for stage in found] == [8] + [0] * (len(found) - 1)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"layers": "all", "protect_first": 1, "protect": [4]}, [1, 2, 3, 5, 6, 7]),
        ({"layers": "every_second"}, [1, 3, 5, 7]),
        ({"layers": "every_second", "count": None, "protect_last": 1}, [1, 3, 5]),
        ({"layers": "every_second", "count": 2, "order": "alternate"}, [3, 5]),
        ({"layers": [6, 2]}, [2, 6]),
        ({"layers": [6, 2], "count": 1}, [6]),
        ({"count": 3}, [1, 5, 7]),
        ({"count": 2, "order": "middle_out"}, [3, 4]),
    ],
)
def test_layers_are_chosen_as_in_every_schedule(settings: dict[str, Any], layers: list[int]) -> None:
    scores = {layer: float(layer not in (1, 5, 7)) for layer in range(8)}
    assert [edit.layer for edit in stages(scores=scores, **settings)[0].edits] == layers
    schedule = Align(ConvertTo(GLA), **settings)
    assert schedule.scoring == ("once" if settings == {"count": 3} else "never")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixers": "heads"}, "schedule.mixers='heads' is unknown; choose auto, matrix, mixer_output or null"),
        ({"layers": "odd"}, "schedule.layers='odd' is unknown; choose all, every_second or a list"),
        ({"layers": [1, 1]}, "lists layer 1 twice"),
        ({"layers": [9]}, r"layers 0\.\.7"),
        ({"count": 9, "order": "alternate"}, "only 8 layers may be edited"),
        ({"count": 0}, "nothing would be edited"),
        ({"layers": "every_second", "protect": [1, 3, 5, 7]}, "every layer is protected: nothing would be edited"),
        ({"mixers_share": 0.6, "hidden_share": 0.4}, r"leave something for the last stage, got 0\.6, 0\.4 and 0\.0"),
        ({"hidden_share": -0.1}, "must be >= 0"),
        ({"shape": "steep"}, "shape 'steep' of a rate is unknown"),
        ({"tokens": -1}, "schedule.tokens must be >= 0"),
    ],
)
def test_values_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stages(**settings)


def test_only_conversions_are_aligned() -> None:
    with pytest.raises(ValueError, match="use edit=convert"):
        Align(RemoveLayers())


def test_a_gradual_schedule_converts_a_few_layers_per_stage() -> None:
    schedule = Iterative(ConvertTo(GLA), count=-1, per_stage=3, order="alternate", tokens=900)
    history, found = History(Record(8)), []
    while (stage := next_stage(schedule, history)) is not None:
        found.append([edit.layer for edit in stage.edits])
        assert stage.objective == "loss"
        history = history.after(stage)
    assert [len(layers) for layers in found] == [3, 3, 2]
    assert sorted(layer for layers in found for layer in layers) == list(range(8))
    student = tiny("llama", layers=8)
    surgery.apply(student, Record(8), history.record.edits)
    assert all(hasattr(block.get_submodule("self_attn"), "mixer") for block in Stack(student).layers)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def recipe(mixers: str = "matrix", **settings: Any) -> Align:
    """Six, six and six steps, from random projections: copied ones are close to a random teacher's already."""
    shares = {"mixers_share": 1 / 3, "hidden_share": 1 / 3, "tokens": 18 * TOKENS}
    rates = {"mixers_lr": 3e-3, "hidden_lr": 1e-3}
    mixer = replace(GLA, kwargs={**GLA.kwargs, "init": "random"})
    return Align(ConvertTo(mixer), **{**shares, **rates, "mixers": mixers, **settings})


@pytest.fixture
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    cache = tmp_path_factory.getbasetemp() / "cache"
    return lambda *args, **changes: make_parts(*args, text, cache, **{"schedule": recipe(), **changes})


def curve(run_dir: Path, name: str) -> list[float]:
    """Every logged value of a metric."""
    rows = csv.DictReader((run_dir / "metrics.csv").read_text().splitlines())
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.mark.parametrize("mixers", ["matrix", "mixer_output"])
def test_a_run_aligns_and_distils(mixers: str, make: Callable[..., Parts], tmp_path: Path) -> None:
    result = run(make(tmp_path / "run", schedule=recipe(mixers), dropout=0.0))
    assert [stage.name for stage in result.stages] == ["teacher", "mixers", "hidden", "end to end"]
    assert [stage.tokens for stage in result.stages] == [n * TOKENS for n in (0, 6, 12, 18)]
    assert all(stage.status == "kept" and stage.ppl > 0 for stage in result.stages)
    for name, number in ((mixers, 1), ("hidden", 2)):
        values = curve(tmp_path / "run", f"train/{name}")
        # one row per step; the term `hidden` of the last stage is logged under the same name
        assert sum(values[4:6]) < sum(values[:2])
        assert result.stages[number].events[-1].startswith(f"{name} by layer in the last step: 0: ")
    assert not any("by layer" in event for event in result.stages[3].events)
    assert len(curve(tmp_path / "run", "train/kl")) == 6, "the losses are those of the last stage alone"
    rows = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [(row["stage"], len(row["edits"])) for row in rows] == [
        ("teacher", 0),
        ("mixers", 4),
        ("hidden", 0),
        ("end to end", 0),
    ]


def test_users_are_told_what_the_mixers_took_over(make: Callable[..., Parts], tmp_path: Path) -> None:
    result = run(make(tmp_path / "run", schedule=recipe(tokens=9 * TOKENS, layers=[1, 2])))
    [told] = [event for event in result.stages[1].events if event.startswith("GLA, layers 1, 2: ")]
    for words in ("q_proj fresh: mixer.init=random", "decay fresh: ", "gate fresh: ", "rotary not used"):
        assert words in told
        assert words in (tmp_path / "run" / "report.html").read_text()


def test_resume_inside_every_stage_is_bitwise(make: Callable[..., Parts], tmp_path: Path) -> None:
    schedule = recipe(tokens=9 * TOKENS, layers=[1, 2])
    whole = run(make(tmp_path / "whole", schedule=schedule))
    for batch in (5, 11, 17):
        folder = tmp_path / f"crashed{batch}"
        parts = make(folder, schedule=schedule)
        parts.callbacks.append(At(batch, crash))
        with pytest.raises(Crash):
            run(parts)
        resumed = run(make(folder, schedule=schedule, resume=True))
        assert same(weights(resumed), weights(whole))
        for a, b in zip(resumed.stages, whole.stages, strict=True):
            assert (a.ppl, a.kl, a.tokens, a.events) == (b.ppl, b.kl, b.tokens, b.events)


def test_the_plan_is_printed_and_checked_before_the_first_step(
    make: Callable[..., Parts], tmp_path: Path, capsys: Any
) -> None:
    parts = make(tmp_path / "plan")
    run(replace(parts, options=replace(parts.options, plan_only=True)))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("mixers", "hidden", "end to end"))
    wide = ConvertTo(replace(GLA, kwargs={**GLA.kwargs, "heads": 3}))
    parts = make(tmp_path / "wide", schedule=Align(wide, tokens=18 * TOKENS, mixers_share=0.3))
    with pytest.raises(ValueError, match="mixes with 3 heads"):
        run(parts)
    assert not (tmp_path / "wide" / "checkpoints").exists()


def test_losses_that_are_not_finite_are_skipped(make: Callable[..., Parts], tmp_path: Path) -> None:
    """In an alignment stage too: the step changes nothing, is counted, and the run goes on."""
    parts = make(tmp_path / "run", schedule=recipe(tokens=9 * TOKENS, layers=[1, 2]))

    def poison(module: Any) -> None:
        """Once: the gradients of this micro-batch are not numbers."""
        for parameter in module.student.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("nan"))

    parts.callbacks.append(At(3, poison))
    result = run(parts)
    assert "step 2 skipped" in " ".join(result.stages[1].events)
    assert [stage.status for stage in result.stages] == ["kept"] * 4


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """DDP: every micro-batch's gradients are summed over the ranks, although they were made before its backward."""
    write_text(tmp_path)
    schedule = recipe(tokens=9 * TOKENS)
    for name, size, strategy in (("one", 1, None), ("ddp", 2, "ddp")):
        changes = {"schedule": schedule}
        run_world(size, programs.train, tmp_path, name, size, strategy, changes, folder=tmp_path / "logs" / name)
    one, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one-0", "ddp-0", "ddp-1"))
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert second["sums"] == first["sums"] == pytest.approx(one["sums"], rel=1e-5)
    world = World(2, programs.train, (tmp_path, "fsdp", 2, "fsdp", {"schedule": schedule}), tmp_path / "logs" / "fsdp")
    assert world.wait() == [1, 1]
    assert "use trainer=ddp, or schedule.mixers=null" in world.said()

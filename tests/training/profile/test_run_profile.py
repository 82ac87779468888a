"""A run is profiled in its first stage that trains, on what that would read, and nothing of the run is written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from iskd.losses.kl import KL
from iskd.plan import Convert, Remove, Spec, Stage
from iskd.teacher import TeacherCacheSpec
from iskd.training.profile import profile_parts
from tests.factories import digest
from tests.runs import Scripted, make_parts, write_text


@pytest.mark.usefixtures("_small_peak")
@pytest.mark.parametrize("objective", ["loss", "mixer_output"])
def test_a_run_is_profiled_in_its_first_stage_that_trains(objective: str, tmp_path: Path) -> None:
    mixer = Spec("iskd.mixers.linear_attention.LinearAttention", {})
    stages = [Stage("cut", (Remove(1),)), Stage("heal", (Convert(2, mixer),), tokens=256, objective=objective)]
    text, cache = write_text(tmp_path), tmp_path / "cache"
    parts = make_parts(tmp_path / "run", text, cache, schedule=Scripted(stages), dropout=0.0)
    before = digest(parts.teacher.model)
    profile = profile_parts(parts, steps=1, operators=False)
    assert profile.stage == "heal"
    assert profile.tokens == 2 * 2 * 32
    assert ("alignment" in profile.seconds) == (objective != "loss")
    assert digest(parts.teacher.model) == before
    assert not list((tmp_path / "run").iterdir())
    if objective == "loss":
        whole = profile_parts(parts, steps=1, edits=False, operators=False)
        assert whole.flops["student"] > profile.flops["student"]
        assert whole.flops["teacher"] == profile.flops["teacher"]


@pytest.mark.usefixtures("_small_peak")
def test_a_run_with_a_teacher_cache_is_profiled_as_it_reads_it(tmp_path: Path) -> None:
    stages, terms = [Stage("heal", (Remove(1),), tokens=256)], {"kl": (KL(), 1.0)}
    made = partial(make_parts, text=write_text(tmp_path), cache=tmp_path / "data", schedule=Scripted(stages))
    live, cached = (made(tmp_path / name, terms=terms) for name in ("live", "cached"))
    cached = replace(cached, teacher_cache=TeacherCacheSpec())
    found, expected = (profile_parts(parts, steps=1, operators=False) for parts in (cached, live))
    assert "teacher" in expected.seconds
    assert "teacher" not in found.seconds
    assert set(found.flops) == set(expected.flops) - {"teacher"}
    assert found.flops["student"] == expected.flops["student"]
    assert not (tmp_path / "teacher").exists()  # the cache of a run is not made for a profile


def test_runs_that_cannot_be_profiled_are_refused(tmp_path: Path) -> None:
    text, cache = write_text(tmp_path), tmp_path / "cache"
    nothing = make_parts(tmp_path / "a", text, cache, schedule=Scripted([Stage("cut", (Remove(1),))]))
    with pytest.raises(ValueError, match="no stage of the schedule trains"):
        profile_parts(nothing, steps=1)
    odd = make_parts(tmp_path / "b", text, cache, trainer={"precision": "64-true"})
    with pytest.raises(ValueError, match="choose auto, bf16-mixed or 32-true"):
        profile_parts(odd, steps=1)

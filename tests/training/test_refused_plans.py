"""Plans that could not be carried out, or that would judge students before they are healed, are refused at once."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iskd.plan import Record
from iskd.refits.output import Output
from iskd.schedules import History, forecast
from iskd.schedules.edits import MergeLayers, RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.schedules.mixed import Mixed, Step
from iskd.schedules.oneshot import Oneshot
from iskd.training import run
from iskd.training.deciding import check_floor
from iskd.training.editing import Editor
from iskd.training.stages import StageLoop
from tests.runs import make_parts, write_text

HEALED_LAST = Iterative(
    RemoveLayers(), layers=[3, 1], count=2, tokens=1000, final_share=1.0, refit_share=0.0, floor=0.9
)


def check(schedule: Any, refits: Any) -> None:
    by_step = [refits] * len(schedule.parts) if isinstance(schedule, Mixed) else ()
    plan = forecast(schedule, History(Record(4), pass_tokens=1000))
    check_floor(schedule, plan, Editor(refits, by_step=by_step).refits_after)


@pytest.mark.parametrize("refits", [(), (Output(),)])
@pytest.mark.parametrize("tokens", [0, 1000, None])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_floor_judges_no_student_before_it_is_healed(mixed: bool, tokens: int | None, refits: Any) -> None:
    """Each way out that the message names is one; where nothing would heal a student later, there is none to wait for.

    `tokens` None: by passes over the text.
    """
    alone = replace(HEALED_LAST, tokens=tokens or 0, epochs=None if tokens is not None else 1.0)

    def of(schedule: Iterative) -> Any:
        return Mixed(parts=[Step(Oneshot(RemoveLayers(), layers=[0], tokens=0)), Step(schedule)]) if mixed else schedule

    if not refits and tokens == 0:
        check(of(alone), refits)
        return
    place = r"schedule\.steps\[1\]\." if mixed else r"schedule\."
    with pytest.raises(ValueError, match=rf"^{place}floor=0\.9 judges .*'remove 3' is neither") as refused:
        check(of(alone), refits)
    ways = dict(re.findall(rf"{place}(final_share|refit_share)=([\d.]+)", str(refused.value)))
    assert set(ways) == {key for key, on in (("final_share", tokens != 0), ("refit_share", refits)) if on}
    for key, value in ways.items():
        check(of(replace(alone, **{key: float(value)})), refits)
    check(of(replace(alone, floor=None)), refits)


def test_a_run_is_refused_before_its_first_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little text for merges, and a floor too early."""

    def measured(*_: Any) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr(StageLoop, "_measure", measured)
    text = write_text(tmp_path)
    merges = Iterative(MergeLayers(), layers=[2, 3], count=2, tokens=1000)
    for number, (schedule, fit_tokens, said) in enumerate(
        [
            (merges, 0, r"a merge needs two calibration windows at least, .* and has 0: raise run\.fit_tokens"),
            (merges, 32, r"a merge needs two calibration windows at least, .* and has 1: raise run\.fit_tokens"),
            (HEALED_LAST, 1024, r"schedule\.floor=0\.9 judges .* Set schedule\.final_share=0\.5 \(train after each\),"),
        ]
    ):
        parts = make_parts(
            tmp_path / f"run {number}",
            text,
            tmp_path / "cache",
            schedule=schedule,
            options={"fit_tokens": fit_tokens},
        )
        with pytest.raises(ValueError, match=said):
            run(parts)

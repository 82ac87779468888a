"""Budgets in passes over the training text, `schedule.epochs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iskd.plan import Record, Spec, Stage
from iskd.schedules import History, next_stage
from iskd.schedules.align import Align
from iskd.schedules.edits import ConvertTo, RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.schedules.none import NoEdits
from iskd.schedules.oneshot import Oneshot
from iskd.training import run
from tests.runs import make_parts, write_text

PASS = 1000
MIXER = ConvertTo(Spec("iskd.mixers.gla.GLA"))


def budgets(schedule: Any, pass_tokens: int | None = PASS) -> list[int]:
    record, stages = Record(8), list[Stage]()
    while (stage := next_stage(schedule, History(record, tuple(stages), pass_tokens=pass_tokens))) is not None:
        record = record.extended(stage.edits)
        stages.append(stage)
    return [stage.tokens for stage in stages]


def removing(**keys: Any) -> Iterative:
    return Iterative(RemoveLayers(), order="middle_out", **keys)


@pytest.mark.parametrize("epochs", [0.25, 1, 2.5])
def test_every_stage_that_trains_gets_so_many_passes(epochs: float) -> None:
    once = round(epochs * PASS)
    assert budgets(removing(count=3, epochs=epochs)) == [once] * 3
    assert budgets(removing(count=5, per_stage=2, epochs=epochs)) == [once] * 3
    assert budgets(removing(count=3, epochs=epochs, final_share=1.0)) == [0, 0, once]
    assert budgets(Oneshot(RemoveLayers(), count=3, order="middle_out", epochs=epochs)) == [once]
    assert budgets(NoEdits(epochs=epochs, tokens=0)) == [once]


def test_the_stages_of_an_alignment_share_the_passes_of_the_run() -> None:
    by_epochs, by_tokens = Align(MIXER, epochs=2, tokens=0), Align(MIXER, tokens=2 * PASS)
    assert budgets(by_epochs) == budgets(by_tokens)
    assert sum(budgets(by_epochs)) == 2 * PASS


def test_passes_stand_in_the_place_of_tokens() -> None:
    assert budgets(removing(count=2, epochs=1, tokens=7)) == [PASS, PASS]
    assert budgets(removing(count=2, tokens=8), None) == [4, 4]


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule.epochs=1 .*not known here: set schedule.epochs=null"):
        budgets(removing(count=2, epochs=1), None)
    with pytest.raises(ValueError, match=r"schedule.epochs=1e-06 is no token of a text of 1,000"):
        budgets(removing(count=2, epochs=1e-6))
    with pytest.raises(ValueError, match=r"schedule.final_share=0.3 .* set schedule.final_share=0, or 1"):
        removing(count=2, epochs=1, final_share=0.3)


def test_a_run_sees_the_whole_text_in_every_stage(tmp_path: Path) -> None:
    schedule = Iterative(RemoveLayers(), layers=[2, 1], epochs=1, lr=1e-3)
    text = write_text(tmp_path)
    text.write_text(text.read_text()[:12_000])
    parts = make_parts(tmp_path / "run", text, tmp_path / "cache", schedule=schedule)
    once = parts.data.pass_tokens
    step = parts.data.batch_size * parts.data.seq_len * parts.trainer["accumulate_grad_batches"]
    stages = run(parts).stages
    assert [stage.tokens for stage in stages] == pytest.approx([0, once, 2 * once], abs=step)

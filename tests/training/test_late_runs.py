"""Runs that cut and refit first and train last: `schedule.final_share=1`, here with Muon."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from iskd.importance.block_influence import BlockInfluence
from iskd.models.weights import model_tensors
from iskd.plan import Remove, Stage
from iskd.refits import Refit
from iskd.refits.magnitude import Magnitude
from iskd.refits.output import Output
from iskd.refits.replaceme import ReplaceMe
from iskd.schedules.edits import RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.training import Parts, run
from iskd.training.stages import StageLoop
from iskd.training.step.muon import MuonSpec
from tests.runs import TOKENS, At, Crash, Scripted, crash, make_parts, same, weights, write_text

STEPS = 4


class Watched(BlockInfluence):
    """Remembers the weights of the students that it scores."""

    seen: list[dict[str, Tensor]]

    def __call__(self, student: Any, teacher: Any, batches: Sequence[Tensor]) -> Tensor:
        self.seen.append({name: value.clone() for name, value in model_tensors(student).items()})
        return super().__call__(student, teacher, batches)


def test_cuts_with_refits_come_first_and_all_training_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three cuts; every student is measured and scored as refitted; killed between cuts and in training, it resumes."""
    text, importance = write_text(tmp_path), Watched()
    importance.seen = []

    def make(name: str, **changes: Any) -> Parts:
        schedule = Iterative(
            RemoveLayers(), count=3, tokens=STEPS * TOKENS, final_share=1.0, refit_share=0.5, rescore=True, lr=1e-3
        )
        changes |= {"schedule": schedule, "importance": importance, "options": {"checkpoint_every": 1}}
        refits = (Output(tokens=512, held_tokens=128, folds=1, ridge=0.3),)
        optim = MuonSpec(decay="linear", warmup=0.0)
        return make_parts(
            tmp_path / name, text, tmp_path / "cache", refits=refits, optim=optim,
            trainer={"log_every_n_steps": 1}, **changes,
        )  # fmt: skip

    before: list[dict[str, Tensor]] = []
    original = StageLoop.edit

    def watched(self: StageLoop) -> None:
        before.append({name: value.clone() for name, value in model_tensors(self.live.module.student).items()})
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "edit", watched)
        whole = run(make("whole"))
    assert [stage.tokens for stage in whole.stages] == [0, 0, 0, STEPS * TOKENS]
    assert all(any("refit output" in event for event in stage.events) for stage in whole.stages[1:])
    for stage in whole.stages[1:3]:
        assert stage.before is not None
        assert stage.before["kl"] == stage.kl > 0, "measured once, as refitted"
    last = whole.stages[3].before
    assert last is not None
    assert last["kl"] != whole.stages[3].kl
    assert len(importance.seen) == len(before) == 3
    assert all(same(one, other) for one, other in zip(importance.seen, before, strict=True)), "scored as refitted"
    rows = list(csv.DictReader((whole.run_dir / "metrics.csv").read_text().splitlines()))
    rates = [float(row["lr/base"]) for row in rows if row.get("lr/base")]
    assert rates == pytest.approx([1e-3 * (1 - step / STEPS) for step in range(STEPS)]), "one curve"
    assert sum(bool(row.get("train/refit_seconds")) for row in rows) == 3

    calls = iter(range(10))

    def broken(self: StageLoop) -> None:
        if next(calls) == 1:
            raise Crash
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "edit", broken)
        with pytest.raises(Crash):
            run(make("killed"))
    with pytest.raises(Crash):
        run(make("killed", resume=True, callbacks=[At(2 * STEPS - 2, lambda _: crash())]))
    resumed = run(make("killed", resume=True))
    assert same(weights(resumed), weights(whole))
    for one, other in zip(resumed.stages, whole.stages, strict=True):
        assert (one.name, one.kl, one.before, one.tokens) == (other.name, other.kl, other.before, other.tokens)


@pytest.mark.parametrize(
    "refit",
    [
        Output(tokens=512, held_tokens=128, folds=1, ridge=0.3, blocks="gaps", projections=("mlp",)),
        Magnitude(tokens=256, held_tokens=128),
        ReplaceMe(tokens=512, held_tokens=128, ridge=0.1),
    ],
    ids=["output", "magnitude", "replaceme"],
)
def test_one_refit_at_the_end_is_about_all_edits(refit: Refit, tmp_path: Path) -> None:
    """Cut one by one and refitted behind the last cut, a student is that of the same cuts at once."""
    text, cuts = write_text(tmp_path), (Remove(1), Remove(3))
    once = [Stage("both", cuts)]
    late = [Stage("one", cuts[:1], refit_share=0.0), Stage("two", cuts[1:])]
    between = [Stage("one", cuts[:1], refit_share=0.5), Stage("two", cuts[1:])]
    found = []
    for name, stages in (("once", once), ("late", late), ("between", between)):
        parts = make_parts(tmp_path / name, text, tmp_path / "cache", schedule=Scripted(stages), refits=(refit,))
        found.append(run(parts))
    assert same(weights(found[0]), weights(found[1]))
    told = [[re.sub(r" in \d+ s$", "", event) for event in one.stages[-1].events] for one in found]
    assert told[0] == told[1]
    assert not same(weights(found[0]), weights(found[2])), "what was refitted is not refitted again"

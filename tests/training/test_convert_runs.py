"""Gradual conversion end to end: a few layers per stage, broken off in the middle and taken up again."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from iskd.models import Stack
from iskd.models.hosting import HostedMixer
from iskd.schedules.edits import ConvertTo
from iskd.schedules.iterative import Iterative
from iskd.training.parts import Parts
from iskd.training.runner import run
from tests.factories import mixer_specs
from tests.runs import TOKENS, At, Crash, crash, make_parts, same, weights, write_text


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Callable[..., Parts]:
    """Runs of two stages, two layers and four steps each, all layers in the end."""
    cache, text = tmp_path_factory.getbasetemp() / "cache", write_text(tmp_path)
    edit = ConvertTo(mixer_specs()["gla"])

    def parts(run_dir: Path, *, resume: bool = False) -> Parts:
        schedule = Iterative(edit, count=-1, per_stage=2, order="middle_out", tokens=8 * TOKENS, lr=1e-3, lr_new=3e-3)
        return make_parts(run_dir, text, cache, schedule=schedule, resume=resume)

    return parts


@pytest.mark.parametrize("batch", [9, 13], ids=["first step", "between checkpoints"])
def test_resumed_inside_the_second_conversion_it_is_the_uninterrupted_run(
    batch: int, make: Callable[..., Parts], tmp_path: Path
) -> None:
    whole = run(make(tmp_path / "whole"))
    parts = make(tmp_path / "crashed")
    parts.callbacks.append(At(batch, crash))
    with pytest.raises(Crash):
        run(parts)
    resumed = run(make(tmp_path / "crashed", resume=True))
    assert same(weights(resumed), weights(whole))
    for a, b in zip(resumed.stages, whole.stages, strict=True):
        assert (a.name, a.status, a.ppl, a.kl) == (b.name, b.status, b.ppl, b.kl)
        assert (a.tokens, a.events) == (b.tokens, b.events)
    assert [stage.tokens for stage in whole.stages] == [0, 4 * TOKENS, 8 * TOKENS]
    assert sorted(edit.layer for edit in whole.record.edits) == [0, 1, 2, 3]
    stack = Stack(resumed.student)
    assert all(isinstance(block.get_submodule(stack.family.attn), HostedMixer) for block in stack.layers)
    rows = list(csv.DictReader((tmp_path / "crashed" / "metrics.csv").read_text().splitlines()))
    losses = [row["train/kl"] for row in rows if row.get("train/kl")]
    assert len(losses) == 8, "every stage has the plain loss"
    assert not any("by layer" in event for stage in whole.stages for event in stage.events)

"""The bar of a run on a terminal: above it what is logged, nothing left of it, and none of it in what can be piped."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from iskd.training.progress_bar import StageProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(steps: int = 4) -> tuple[StageProgress, SimpleNamespace]:
    state = SimpleNamespace(stage=SimpleNamespace(name="replace 1"), finished=[], total_stages=2, tokens=64)
    run = SimpleNamespace(state=SimpleNamespace(**vars(state), total_steps=steps), count=SimpleNamespace(in_run=0))
    return StageProgress(cast(Any, run), every=0.0), run


def test_a_bar_leaves_nothing_and_logs_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    for name, stream in (("stdout", out), ("stderr", err)):
        monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, f"__{name}__", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    handler = logging.StreamHandler(err)
    logger = logging.getLogger("tests.bar")
    logger.addHandler(handler)
    bar, run = progress()
    try:
        bar.on_train_start(cast(Any, None), cast(Any, None))
        for step in range(1, 5):
            run.count.in_run = step
            trainer = SimpleNamespace(is_last_batch=step == 4)
            bar.on_train_batch_end(cast(Any, trainer), cast(Any, None), {"loss": 1.0}, {}, step)
            assert (handler.stream is err) == (step == 4), "rich's own stream while the bar stands"
            logger.warning("line %d", step)
    finally:
        logger.removeHandler(handler)
    assert "stage 1/2 replace 1" in err.getvalue()
    assert all(f"line {step}\n" in err.getvalue() for step in range(1, 5)), "no line holds a part of the bar"
    assert err.getvalue().endswith("line 4\n")
    assert out.getvalue() == ""
    assert sys.stderr is err


def test_a_file_gets_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    bar, _ = progress()
    bar.on_train_start(cast(Any, None), cast(Any, None))
    bar.on_train_batch_end(cast(Any, SimpleNamespace(is_last_batch=False)), cast(Any, None), {"loss": 1.0}, {}, 0)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("stage 1/2 replace 1: step 0/4, 64 tokens, loss 1.000, ")
    assert said.err.count("\n") == 1

"""Laws of a decision: scores are asked for among those who may go, ties are told, trials are judged on other text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.importance import Fixed, WindowImportance
from iskd.importance.restore import Restore
from iskd.plan import Record, Spec
from iskd.refits.calibrate import Calibrate
from iskd.refits.values import Values
from iskd.schedules import Choice, History
from iskd.schedules.align import Align
from iskd.schedules.edits import ConvertTo, RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.schedules.mixed import Mixed, Step
from iskd.schedules.oneshot import Oneshot
from iskd.training import deciding, stages
from iskd.training.deciding import check_importance, no_better_than_guessing
from iskd.training.parts import Parts
from iskd.training.runner import run
from tests.runs import TOKENS, make_parts, write_text

ROWS = torch.tensor([[0.0, 0.1], [1.0, 1.2], [1.1, 1.15], [3.0, 3.3], [1.2, 1.05]])


class Known(WindowImportance):
    """Rows that are given; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def choosing(self, candidates: Sequence[int], number: int, layers: Sequence[int]) -> Known:
        self.asked.append((list(candidates), number))
        return self

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        return ROWS


def note(choice: Choice, layers: Sequence[int] = range(5)) -> str:
    class Both(torch.nn.Module):
        student = teacher = torch.nn.Linear(1, 1)

    return deciding._scored(Known(), Both(), [], list(layers), choice)[1]  # type: ignore[arg-type]


def test_ties_are_told_among_those_who_may_go() -> None:
    assert note(Choice((0, 1, 2, 3, 4), 1)) == ""
    # layer 0 is protected: what ties with the one that goes counts, and not with the lowest of all
    assert note(Choice((1, 2, 3, 4), 1)) == "the scores of layers [2, 4] are within noise of that of layer 1"
    # two go, 1 and then 2 or 4: of those that stay the one that ties with the last that goes
    assert note(Choice((0, 1, 2, 3, 4), 3)) == "the scores of layers [4] are within noise of that of layer 2"
    assert note(Choice((0, 1, 2, 3, 4), 5)) == ""
    assert note(Choice((12, 16), 1), [2, 12, 16, 20, 24]).endswith("[16] are within noise of that of layer 12")


def test_a_score_that_is_nan_is_refused_by_its_layer_and_never_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS.clone()
    rows[3, 0] = math.nan
    monkeypatch.setattr(Known, "rows", lambda *_: rows)
    for number in (1, 3, 5):
        with pytest.raises(ValueError, match=r"importance of layers \[20\] is not finite"):
            note(Choice((2, 12, 16, 20, 24), number), [2, 12, 16, 20, 24])
    assert note(Choice((2, 12), 1), [2, 12, 16, 20, 24]) is not None, "layers that nobody may choose are not asked"


def test_windows_that_were_not_read_say_nothing() -> None:
    rows = torch.tensor([[1.0, 1.2, torch.nan], [1.1, 1.15, torch.nan], [torch.nan] * 3, [1.0, 1.2, 1.0]])
    assert deciding.within_noise(rows, 0, range(4)) == [1, 3]


def history(*edits: int) -> History:
    return History(Record(8).extended([RemoveLayers().make(layer, 0) for layer in edits]))


def test_what_a_schedule_asks_scores_for() -> None:
    each = Iterative(RemoveLayers(), target_layers=4, tokens=0, rescore=True, protect_first=2)
    assert each.choice(history()) == Choice((2, 3, 4, 5, 6, 7), 1)
    assert each.choice(history(3)) == Choice((2, 4, 5, 6, 7), 1)
    once = Iterative(RemoveLayers(), target_layers=4, tokens=0, protect=[7])
    assert once.choice(history()) == Choice((0, 1, 2, 3, 4, 5, 6), 4)
    pairs = Iterative(RemoveLayers(), count=3, per_stage=2, tokens=0, rescore=True)
    assert (pairs.choice(history()).number, pairs.choice(history(1, 2)).number) == (2, 1)
    tried = Iterative(RemoveLayers(), count=1, tokens=0, rescore=True, candidates=3, trial_tokens=8)
    assert tried.choice(history()) == Choice(tuple(range(8)), 1, 2)
    assert Oneshot(RemoveLayers(), count=5, tokens=0).choice(history()).number == 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    return partial(make_parts, text=text, cache=tmp_path_factory.getbasetemp() / "cache", dropout=0.0)


def test_trials_are_judged_on_calibration_text(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    measure = stages.measure_quality

    def watch(student: Any, teacher: Any, batches: Any, remembered: Any = None, **how: Any) -> dict[str, float]:
        if remembered is None:  # what is remembered is validation
            seen.extend(batch["input_ids"] for batch in batches)
        return measure(student, teacher, batches, remembered, **how)

    monkeypatch.setattr(stages, "measure_quality", watch)
    guarded = Iterative(RemoveLayers(), count=1, tokens=TOKENS, rescore=True, candidates=2, trial_tokens=TOKENS)
    parts = make(tmp_path / "run", schedule=guarded)
    result = run(parts)
    wanted = parts.data.calibration(parts.data.val_tokens)
    assert all(torch.equal(*pair) for pair in zip(seen, [*wanted, *wanted], strict=True)), "once for each of two trials"
    reported = {tuple(row) for row in parts.data.validation_windows().tolist()}
    assert not reported & {tuple(row) for batch in seen for row in batch.tolist()}
    assert any(event.startswith("KL after") for event in result.final.events)


def test_scores_that_cannot_be_had_are_refused_before_anything_runs() -> None:
    scored = Iterative(RemoveLayers(), count=2, tokens=0, rescore=True)
    with pytest.raises(ValueError, match="needs scores"):
        check_importance(scored, None)
    with pytest.raises(ValueError, match="rescore=false"):
        check_importance(scored, Fixed(order=[2, 0, 1]))
    check_importance(Iterative(RemoveLayers(), count=2, tokens=0), Fixed(order=[2, 0, 1]))
    check_importance(Iterative(RemoveLayers(), layers=[1], tokens=0), None)


def test_what_a_run_has_no_use_for_is_refused(make: Callable[..., Parts], tmp_path: Path) -> None:
    """Which layers keep attention, where all are converted; refits of mixers, where there are none."""
    everywhere = Align(ConvertTo(Spec("iskd.mixers.gla.GLA")), mixers=None, hidden=False)
    asked = Restore(convert=everywhere.edit)
    with pytest.raises(ValueError, match=r"importance=restore says .* set schedule\.attention_share or "):
        check_importance(everywhere, asked)
    check_importance(Align(everywhere.edit, attention_share=0.5, mixers=None, hidden=False), asked)
    steps = [Step(everywhere, None, ()), Step(Iterative(RemoveLayers(), count=1, tokens=0), None, ())]
    check_importance(Mixed(steps), Fixed(order=[2, 0, 1]))
    removal = Iterative(RemoveLayers(), layers=[1], tokens=0)
    for refit in (Calibrate(tokens=64, held_tokens=32), Values(tokens=64, held_tokens=32)):
        with pytest.raises(ValueError, match=f"refit={refit.name()} is for the mixers of edit=convert"):
            run(make(tmp_path / refit.name(), schedule=removal, refits=[refit]))


@pytest.mark.parametrize(
    ("ppl", "teacher", "told"),
    [(256.0, 20.0, False), (257.0, 20.0, True), (math.nan, 20.0, True), (math.inf, 20.0, True), (300.0, 260.0, False)],
)
def test_a_student_that_guesses_is_told(ppl: float, teacher: float, told: bool) -> None:
    said = no_better_than_guessing({"ppl": ppl, "teacher_ppl": teacher}, 257)
    assert ("not below the 257 of guessing" in said) == told

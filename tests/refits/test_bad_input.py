"""What a user can mend is said in a sentence, and text that is too little does no harm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from iskd.commands.compose import compose_config
from iskd.models import Stack, surgery
from iskd.plan import Record, Remove
from iskd.refits import Refit, refit_survivors
from iskd.refits.local import Local
from iskd.refits.magnitude import Magnitude
from iskd.refits.output import Output
from iskd.refits.replaceme import ReplaceMe
from tests.factories import digest, louder, text_of, tiny, windows

Text = Callable[[int], list[Tensor]]
KINDS = (Output, Local, Magnitude, ReplaceMe)


def text(tokens: int) -> list[Tensor]:
    return list(windows(max(2, tokens // 16), 16, seed=5).split(4))


def refitted(refit: Refit, given: Text = text, spoil: Callable[[Any, Any], None] = lambda *_: None) -> list[str]:
    teacher = louder(tiny("llama"))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [Remove(1)])
    with torch.no_grad():
        spoil(teacher, made)
    return refit_survivors([refit], made, teacher, record, [Remove(1)], text_of(given, refit))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        *((kind, {"tokens": 0}, rf"refit\.{kind.name()}\.tokens=0: a refit needs calibration text") for kind in KINDS),
        (Output, {"tokens": -1}, r"refit\.output\.tokens=-1: "),
        (Output, {"held_tokens": 0}, r"refit\.output\.held_tokens=0: "),
        (Output, {"streams": "ram"}, r"refit\.output\.streams='ram': choose device, host, disk"),
        (Output, {"blocks": "some"}, r"refit\.output\.blocks='some': choose gaps, above, all"),
        (Output, {"projections": ["mpl"]}, r"projections=\['mpl'\]: give a list of one or both of attention, mlp"),
        (Output, {"projections": "mlp"}, r"projections=mlp: give a list"),
        (Output, {"projections": []}, r"projections=\[\]: give a list"),
        *(
            (Output, {"ridge": ridge}, r"output\.ridge=.*: give a positive")
            for ridge in (0, [], float("nan"), float("inf"), [0.1, -1])
        ),
        (Output, {"attention_share": float("nan")}, r"attention_share=nan: give numbers in \(0, 1\]"),
        (Output, {"folds": 0}, r"refit\.output\.folds=0: give 1"),
        (ReplaceMe, {"ridge": float("nan")}, r"refit\.replaceme\.ridge=nan: give a number, 0 or more"),
        (Local, {"lr": float("inf")}, r"refit\.local\.lr=inf and epochs=\d+: give a positive rate"),
        (Magnitude, {"statistic": "sum"}, r"refit\.magnitude\.statistic='sum': choose"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(kind: type[Refit], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def spoiled(of: str, layer: int, value: float) -> Callable[[Any, Any], None]:
    def spoil(teacher: Any, student: Any) -> None:
        for model in [teacher] if of == "teacher" else [student] if of == "student" else [teacher, student]:
            down = Stack(model).layers[layer].get_submodule("mlp.down_proj")
            down.get_parameter("weight")[0, 0] = value

    return spoil


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["teacher", "student", "both"])
def test_states_that_are_not_finite_are_said(kind: type[Refit], of: str) -> None:
    """Whichever model they come from, whatever the refit would make of them: no weight is touched."""
    with pytest.raises(ValueError, match=rf"refit\.{kind.name()}: the KL .* is not finite .*check the weights"):
        refitted(kind(tokens=64, held_tokens=32), spoil=spoiled(of, 0, float("inf")))


def test_states_that_are_not_finite_on_the_text_to_fit_to_alone_are_said() -> None:
    def spoil(teacher: Any, student: Any) -> None:
        for model in (teacher, student):
            model.get_input_embeddings().weight[3] = float("nan")

    def given(_tokens: int) -> list[Tensor]:
        ids = torch.cat(text(320)).clamp_min(4)
        ids[1, 3] = 3  # windows 0, 4, ... are held out
        return [ids]

    with pytest.raises(ValueError, match=r"layer 0, self_attn\.o_proj: .* not finite on the calibration text"):
        refitted(Output(tokens=240, held_tokens=80), given, spoil)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda _: [], r"0 calibration windows .*data\.calibration_fraction"),
        (lambda _: [windows(1, 16)], r"1 calibration windows of 16 tokens .*at least 16 each"),
        (lambda _: [windows(9, 1)], r"windows of one token .*data\.seq_len"),
    ],
)
def test_text_that_gives_no_two_windows_is_refused(given: Text, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refitted(Output(tokens=64, held_tokens=32), given)


def test_too_little_text_for_the_unknowns_is_said_and_harmless() -> None:
    """Two windows for 96 inputs: the record says how much is needed; error and KL on text left out do not rise."""
    told = refitted(Output(tokens=16, held_tokens=16))
    assert "16 calibration tokens for 96 inputs" in "".join(told)
    assert "refit.output.tokens=768 or more" in "".join(told)
    before, after = (float(word) for word in told[-1].split("KL ")[1].split(" in ")[0].split(" -> "))
    assert after <= before or "taken back" in told[-1]


@pytest.mark.parametrize("kind", [Output, ReplaceMe])
def test_a_singular_system_is_solved_or_refused(kind: type[Refit]) -> None:
    """The same token again and again: rank one. A ridge makes it solvable; without one it is refused by name."""

    def given(_tokens: int) -> list[Tensor]:
        return [torch.full((20, 16), 7)]

    if kind is Output:
        assert "held-out KL" in refitted(Output(tokens=240, held_tokens=80), given)[-1]
    else:
        with pytest.raises(ValueError, match=r"singular or not finite; raise its ridge .*refit\.replaceme\.ridge"):
            refitted(ReplaceMe(tokens=240, held_tokens=80), given)


@pytest.mark.parametrize("folds", [1, 2])
@pytest.mark.parametrize("ridges", [(1e-30, 0.1), (1e-30, 1e-29, 1e-28, 1e-27, 0.1)])
def test_a_ridge_that_is_too_small_is_passed_over(ridges: tuple[float, ...], folds: int) -> None:
    """Where the search begins, too: the next larger one is taken, and the run goes on."""

    def given(_tokens: int) -> list[Tensor]:
        return [torch.full((20, 16), 7)]

    told = refitted(Output(tokens=240, held_tokens=80, ridge=ridges, folds=folds), given)
    solved = [line for line in told if "re-solved" in line]
    assert solved
    assert all(line.split("ridge ")[1].split(",")[0] in ("0.1", "-") for line in solved)
    assert any("ridge 0.1" in line for line in solved)
    with pytest.raises(ValueError, match=r"singular or not finite; raise its ridge .*refit\.output\.ridge"):
        refitted(Output(tokens=240, held_tokens=80, ridge=ridges[:-1], folds=folds), given)


def test_without_edits_and_refits_nothing_is_touched() -> None:
    teacher = louder(tiny("llama"))
    before = digest(teacher)
    assert refit_survivors([], teacher, teacher, Record(4), [], text_of(text, Output())) == []
    assert digest(teacher) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "refit=[output,outptu]",
            r"refit has no choice 'outptu' \(did you mean output\?\); choose calibrate, local, .*replaceme",
        ),
        ("loss=[kll]", r"loss has no choice 'kll' \(did you mean kl\?\); choose ce, hidden, .*kl"),
    ],
)
def test_an_unknown_part_of_a_list_is_refused_with_those_that_there_are(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config([override], Path("unused"))


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_shorter_than_asked_for_is_said(kind: type[Refit]) -> None:
    """What was asked for and what was read; text that lacks less than a window is not short."""
    said = "read 320 calibration tokens of 4,096 asked for"
    assert said in " ".join(refitted(kind(tokens=3072, held_tokens=1024), lambda _: text(320)))
    assert "asked for" not in " ".join(refitted(kind(tokens=250, held_tokens=80), text))

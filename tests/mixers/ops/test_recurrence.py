"""Laws of the mixers' recurrence: chunks, tokens and the matrix are one function, for every kind of decay and rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.mixers.ops import Recurrence, recurrence

DECAYS = ("none", "scalar", "vector")
KINDS = [pytest.param(decay, delta, id=decay + "-delta" * delta) for decay in DECAYS for delta in (False, True)]
Arguments = dict[str, Any]


def on(function: Callable[..., Any], **given: Any) -> Any:
    """The function on a recurrence of these arguments by name, and with those that are not the recurrence's."""
    inputs = {field.name: given.pop(field.name) for field in fields(Recurrence) if field.name in given}
    return function(Recurrence(**inputs), **given)


chunk, step = partial(on, recurrence.chunk), partial(on, recurrence.step)


def matrix(**given: Any) -> Tensor:
    """It asks for no values."""
    mixing: Tensor = on(recurrence.matrix, v=torch.empty(0), **given)
    return mixing


def arguments(
    decay: str,
    delta: bool,
    tokens: int,
    *,
    repeats: int = 1,
    state: bool = False,
    bonus: bool = False,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int, int, int] = (2, 2, 4, 3),
    seed: int = 0,
) -> Arguments:
    """Random arguments of chunk and step by name, those that are None left out; sizes are B, G, K and V."""
    batch, groups, keys, values = sizes
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = (batch, tokens, groups)
    found = {
        "q": randn(batch, tokens, groups * repeats, keys),
        "k": F.normalize(randn(*heads, keys), dim=-1),
        "v": randn(*heads, values),
        "g": F.logsigmoid(randn(*heads, keys) if decay == "vector" else randn(*heads)),
        "beta": 2 * torch.sigmoid(randn(*heads)),
        "state_BGKV": randn(batch, groups, keys, values),
        "bonus": randn(groups, keys),
    }
    wanted = {"g": decay != "none", "beta": delta, "state_BGKV": state, "bonus": bonus}
    return {name: x.to(dtype).requires_grad_() for name, x in found.items() if wanted.get(name, True)}


def piece(given: Arguments, where: slice) -> Arguments:
    """The arguments of some tokens."""
    return {name: x if name in {"state_BGKV", "bonus"} else x[:, where] for name, x in given.items()}


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, check_dtype=False)


def gradients(outputs: tuple[Tensor, ...], given: Arguments) -> tuple[Tensor, ...]:
    """Gradients of a fixed random sum of the outputs."""
    generator = torch.Generator().manual_seed(9)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in outputs)
    return torch.autograd.grad(loss, [x for x in given.values() if x.requires_grad])


def applied(given: Arguments, **more: Any) -> Tensor:
    """What the matrix makes of the values."""
    names = ("q", "k", "g", "beta", "bonus")
    mixing = matrix(**{name: given[name] for name in names if name in given}, **more)
    values = given["v"].repeat_interleave(mixing.shape[1] // given["v"].shape[2], 2)
    return torch.einsum("bhts,bshv->bthv", mixing, values)


def documents(*lengths: int) -> Tensor:
    """Segments [B, T]: the documents of these lengths in one row, in the other two documents that are one token off."""
    cuts = torch.tensor(lengths).cumsum(0)
    position = torch.arange(int(cuts[-1]))
    return torch.stack([torch.bucketize(position, cuts, right=True), (position > lengths[0]).long() + 3])


# ---- one function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bonus", [False, True], ids=["", "bonus"])
@pytest.mark.parametrize(
    ("tokens", "size", "repeats", "state"), [(13, 5, 3, True), (23, 64, 1, False), (1, 4, 2, True)]
)
@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_chunks_give_what_single_tokens_give(
    decay: str, delta: bool, tokens: int, size: int, repeats: int, state: bool, bonus: bool
) -> None:
    given = arguments(decay, delta, tokens, repeats=repeats, state=state, bonus=bonus)
    fast, slow = chunk(**given, scale=0.7, size=size), step(**given, scale=0.7)
    close(fast, slow)
    close(gradients(fast, given), gradients(slow, given))


@pytest.mark.parametrize("segments", [None, documents(1, 6, 7)], ids=["", "packed"])
@pytest.mark.parametrize("bonus", [False, True], ids=["", "bonus"])
@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_the_matrix_gives_what_chunks_give(decay: str, delta: bool, bonus: bool, segments: Tensor | None) -> None:
    given = arguments(decay, delta, 14, repeats=2, bonus=bonus)
    (by_chunks, _), by_matrix = (
        chunk(**given, scale=0.7, segments_BT=segments, size=4),
        applied(given, scale=0.7, segments_BT=segments),
    )
    close(by_matrix, by_chunks)
    close(gradients((by_matrix,), given), gradients((by_chunks,), given))


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 31, 64, 65, 77])
def test_any_number_of_tokens_fits_any_size_of_chunk(tokens: int) -> None:
    given = arguments("vector", True, tokens)
    expected = step(**given)
    for size in (1, 3, 32, 64, 1000):
        close(chunk(**given, size=size), expected)
    close(applied(given), expected[0])


@pytest.mark.parametrize("bonus", [False, True], ids=["", "bonus"])
@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_gradients_are_those_of_finite_differences(decay: str, delta: bool, bonus: bool) -> None:
    given = arguments(decay, delta, 5, repeats=2, state=True, bonus=bonus, sizes=(1, 1, 2, 2))
    assert torch.autograd.gradcheck(
        lambda *x: chunk(**dict(zip(given, x, strict=True)), scale=0.7, size=3), [*given.values()]
    )


# ---- time and documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bonus", [False, True], ids=["", "bonus"])
@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_the_future_does_not_change_the_past(decay: str, delta: bool, bonus: bool) -> None:
    given, other = (arguments(decay, delta, 12, bonus=bonus, seed=seed) for seed in (0, 1))
    changed = {name: x if x.dim() == 2 else torch.cat([x[:, :7], other[name][:, 7:]], 1) for name, x in given.items()}
    for function in (lambda x: chunk(**x, size=5)[0], applied):
        one, two = function(given), function(changed)
        assert torch.equal(one[:, :7], two[:, :7])
        assert ((one - two)[:, 7:].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("bonus", [False, True], ids=["", "bonus"])
@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_a_state_carries_the_past(decay: str, delta: bool, bonus: bool) -> None:
    given = arguments(decay, delta, 15, repeats=2, state=True, bonus=bonus)
    whole, end = chunk(**given, size=4)
    state, outputs = given.pop("state_BGKV"), []
    for where, function in [
        (slice(0, 6), chunk),
        (slice(6, 7), step),
        (slice(7, 15), chunk),
    ]:
        o, state = function(**piece(given, where), state_BGKV=state)
        outputs.append(o)
    close((torch.cat(outputs, 1), state), (whole, end))


@pytest.mark.parametrize("bonus", [False, True], ids=["", "bonus"])
@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_packed_documents_do_not_meet(decay: str, delta: bool, bonus: bool) -> None:
    segments = documents(4, 1, 9)
    given = arguments(decay, delta, 14, repeats=2, state=True, bonus=bonus)
    shared = {name: x for name, x in given.items() if name == "bonus"}
    for function in (step, lambda **x: chunk(**x, size=5)):
        packed, end = function(**given, segments_BT=segments)
        for row, numbers in enumerate(segments):
            state, outputs = given["state_BGKV"][row : row + 1], []
            for number in numbers.unique():
                tokens = {name: x[row : row + 1, numbers == number] for name, x in given.items() if x.shape[1] == 14}
                o, last = step(**tokens, **shared, state_BGKV=state)
                outputs.append(o)
                state = torch.zeros_like(last)
            close((packed[row : row + 1], end[row : row + 1]), (torch.cat(outputs, 1), last))
        loss = packed[segments > segments[:, :1]].sum() + end.sum()
        for name, slope in zip(given, torch.autograd.grad(loss, [*given.values()]), strict=True):
            assert name == "bonus" or not (slope if name == "state_BGKV" else slope[segments == segments[:, :1]]).any()


# ---- numbers ---------------------------------------------------------------------------------------------------------


def patterns(decay: str, tokens: int, keys: int = 4) -> dict[str, Tensor]:
    """Log decays that break sums of logs: all strong, strong ones among weak ones, exact zeros."""
    shape = (2, tokens, 2, keys) if decay == "vector" else (2, tokens, 2)
    rare = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.2
    weak = torch.full(shape, -0.01)
    return {
        "strong": torch.full(shape, -20.0),
        "mixed": torch.where(rare, -20.0, weak),
        "half": torch.where(torch.arange(tokens).reshape(-1, *[1] * (weak.dim() - 2)) % 64 < 32, -20.0, weak),
        "zero": torch.where(rare, -torch.inf, weak),
    }


@pytest.mark.parametrize("delta", [False, True], ids=["", "delta"])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("pattern", ["strong", "mixed", "half", "zero"])
def test_strong_decays_keep_their_digits(decay: str, delta: bool, pattern: str) -> None:
    given = arguments(decay, delta, 130, state=True, dtype=torch.float32)
    given["g"] = patterns(decay, 130)[pattern].requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    found, expected = chunk(**given), step(**exact)
    close(found, expected, 1e-5)
    slopes = gradients(found, given)
    assert all(x.isfinite().all() for x in slopes)
    close(slopes, gradients(expected, exact), 1e-4)
    by_matrix = applied(given)
    close(by_matrix, step(**{**exact, "state_BGKV": torch.zeros_like(exact["state_BGKV"])})[0], 1e-5)
    assert all(
        x.isfinite().all() for x in gradients((by_matrix,), {k: x for k, x in given.items() if k != "state_BGKV"})
    )


@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_autocast_does_not_reach_inside(decay: str, delta: bool) -> None:
    given = arguments(decay, delta, 20, repeats=2, bonus=True, dtype=torch.float32)
    half = {name: x.bfloat16() for name, x in given.items()}
    for inputs in (given, half):
        wide = {name: x.float() for name, x in inputs.items()}
        for function in (chunk, step):
            expected = function(**wide)
            with torch.autocast("cpu", torch.bfloat16):
                found = function(**inputs)
            assert {x.dtype for x in found} == {torch.float32}
            close(found, expected, 0.0)
        with torch.autocast("cpu", torch.bfloat16):
            names = ("q", "k", "g", "beta", "bonus")
            assert matrix(**{name: inputs[name] for name in names if name in inputs}).dtype == torch.float32


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(2, 6, 4), r"q must be \[B, T, H, K\]"),
        ("q", torch.zeros(2, 6, 3, 4), "heads that 2 key heads divide evenly"),
        ("k", torch.zeros(2, 5, 2, 4), r"k must be \[2, 6, 2, 4\]"),
        ("v", torch.zeros(2, 6, 4, 3), r"v must be \[2, 6, 2, 3\]"),
        ("g", torch.zeros(2, 6, 2, 1), r"g must be \[2, 6, 2, 4\]"),
        ("g", torch.zeros(2, 6, 4), r"g must be \[2, 6, 2\]"),
        ("g", torch.full((2, 6, 2), 0.5), "g must be at most 0, .* largest value is 0.5"),
        ("beta", torch.zeros(2, 6, 2, 4), r"beta must be \[2, 6, 2\]"),
        ("state_BGKV", torch.zeros(2, 2, 3, 4), r"state must be \[2, 2, 4, 3\]"),
        ("bonus", torch.zeros(4), r"bonus must be \[2, 4\]"),
        ("segments_BT", torch.zeros(6), r"segments must be \[2, 6\]"),
        ("segments_BT", torch.tensor([[0, 0, 1, 1, 0, 0]]).expand(2, 6), "segments must not decrease"),
        ("size", 0, "size must be at least 1 token per chunk, got 0"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, message: str) -> None:
    given = {**arguments("scalar", True, 6, repeats=2), name: value}
    with pytest.raises(ValueError, match=message):
        chunk(**given)
    if name != "size":
        with pytest.raises(ValueError, match=message):
            step(**given)


def test_a_row_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least one token"):
        chunk(**arguments("none", False, 0))

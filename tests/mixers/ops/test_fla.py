"""The kernels of fla: what they are given, which calls they serve, and that they compute what torch computes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from iskd.mixers.ops import Recurrence, fla
from tests.mixers.ops.test_recurrence import KINDS, arguments, chunk, close, on, patterns, step

NAMES = {
    ("none", False): "chunk_simple_gla",
    ("scalar", False): "chunk_simple_gla",
    ("vector", False): "chunk_gla",
    ("none", True): "chunk_delta_rule",
    ("scalar", True): "chunk_gated_delta_rule",
    ("vector", True): "chunk_kda",
}


def kernel(seen: list[str], name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """What a kernel of fla computes, and what it demands of its arguments."""

    def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float, initial_state: Any, **more: Any) -> tuple[Tensor, Tensor]:
        seen.append(name)
        assert more.pop("output_final_state")
        assert q.shape == k.shape
        assert k.shape[:3] == v.shape[:3]
        assert k.shape[3] % 8 == v.shape[3] % 8 == 0
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 for x in (*more.values(), initial_state) if x is not None)
        o, state = step(q=q, k=k, v=v, **more, scale=scale, state_BGKV=initial_state)
        return o.to(v.dtype), state

    return run


@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_a_kernel_gets_what_it_expects(decay: str, delta: bool, state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    stand_ins = {name: kernel(seen, name) for name in NAMES.values()}
    monkeypatch.setattr(fla, "ops", lambda: SimpleNamespace(**stand_ins))
    given = arguments(decay, delta, 9, repeats=3, state=state, dtype=torch.bfloat16)
    o, end = on(fla.chunk, **given, scale=0.7)
    expected, expected_end = chunk(**given, scale=0.7)
    assert seen == [NAMES[decay, delta]]
    assert o.dtype == end.dtype == torch.float32
    close(end, expected_end, 1e-5)
    close(o, expected, 2e-2)


def test_kernels_serve_half_precision_on_cuda_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def served(dtype: torch.dtype = torch.bfloat16, width: int = 64, cuda: bool = True) -> bool:
        x: Any = SimpleNamespace(dtype=dtype, shape=(1, 2, 3, width), is_cuda=cuda)
        return fla.serve(Recurrence(x, x, x))

    monkeypatch.delenv("ISKD_FLA", raising=False)
    monkeypatch.setattr(fla, "ops", lambda: None)
    assert not served()
    monkeypatch.setattr(fla, "ops", SimpleNamespace)
    assert served()
    assert served(torch.float16)
    assert not any([served(torch.float32), served(width=257), served(cuda=False)])
    monkeypatch.setenv("ISKD_FLA", "0")
    assert not served()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the flags that fla would have on a machine; they are read anew."""

    def install(**flags: bool) -> None:
        utils = SimpleNamespace(**flags)
        monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(utils=utils))
        monkeypatch.setitem(sys.modules, "fla.utils", utils)
        fla.refuses_scalar_gradients.cache_clear()

    monkeypatch.delenv("ISKD_FLA", raising=False)
    monkeypatch.setattr(fla, "ops", SimpleNamespace)
    yield install
    fla.refuses_scalar_gradients.cache_clear()


HOPPER = {"IS_NVIDIA_HOPPER": True, "TRITON_ABOVE_3_4_0": True, "TRITON_ABOVE_3_7_1": False}
VECTOR, SCALAR = (1, 2, 3, 64), (1, 2, 3)


def served(g: tuple[int, ...] | None, *, learns: str = "q") -> bool:
    """Whether a call in half precision on CUDA is served, of whose inputs one may want a gradient."""

    def tensor(name: str, *shape: int) -> Any:
        return SimpleNamespace(
            dtype=torch.bfloat16, shape=shape, dim=lambda: len(shape), is_cuda=True, requires_grad=name == learns
        )

    q, k, v, beta = (tensor(name, *VECTOR) for name in ("q", "k", "v", "beta"))
    return fla.serve(Recurrence(q, k, v, None if g is None else tensor("g", *g), beta), None)


def test_a_gradient_that_fla_refuses_is_left_to_torch(
    machine: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """On Hopper, of a scalar decay alone; told once."""
    machine(**HOPPER)
    with caplog.at_level(logging.WARNING):
        assert not any(served(SCALAR, learns=name) for name in ("q", "k", "v", "g", "beta"))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "install Triton 3.7.1 or later" in caplog.text
    assert all(served(g) for g in (None, VECTOR))
    assert served(SCALAR, learns="nothing")
    with torch.no_grad():
        assert served(SCALAR)


@pytest.mark.parametrize(
    "flags",
    [
        {**HOPPER, "IS_NVIDIA_HOPPER": False},
        {**HOPPER, "TRITON_ABOVE_3_4_0": False},
        {**HOPPER, "TRITON_ABOVE_3_7_1": True},
        {},
    ],
)
def test_elsewhere_gradients_of_a_scalar_decay_are_served(
    flags: dict[str, bool], machine: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    machine(**flags)
    assert served(SCALAR)
    assert not caplog.records


def test_a_version_of_fla_that_knows_no_mended_triton_refuses(machine: Callable[..., None]) -> None:
    machine(IS_NVIDIA_HOPPER=True, TRITON_ABOVE_3_4_0=True)
    assert not served(SCALAR)


def test_all_that_may_want_a_gradient_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Tensor | None, ...]] = []

    def refuse(x: Recurrence, state: Tensor | None) -> bool:
        asked.append((x.q, x.k, x.v, x.g, x.beta, state))
        return False

    monkeypatch.setattr(fla, "serve", refuse)
    given = arguments("scalar", True, 5, state=True)
    chunk(**given)
    assert [id(x) for x in asked[0]] == [id(x) for x in given.values()]


# ---- on a device -----------------------------------------------------------------------------------------------------


def gradient_of_decay(given: dict[str, Tensor], slopes: dict[str, Tensor]) -> float:
    """Size of the terms q dq and k dk whose difference a kernel sums up to the gradient of a decay.

    Strong decays leave almost nothing of that gradient itself, so that half precision cannot hold its digits.
    """
    return sum(float((given[name] * slopes[name]).float().norm()) for name in ("q", "k"))


CASES = [
    pytest.param(decay, delta, pattern, id=f"{decay}{'-delta' * delta}-{pattern}")
    for decay, delta in NAMES
    for pattern in ("mild", "strong", "mixed", "half")
    if decay != "none" or pattern == "mild"
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("decay", "delta", "pattern"), CASES)
def test_kernels_agree_with_torch(
    decay: str, delta: bool, pattern: str, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every step forgets all but e^-20: finite, and the same numbers."""
    if fla.ops() is None:
        pytest.skip("fla-core is not installed")
    if decay == "scalar" and fla.refuses_scalar_gradients():
        pytest.skip("fla refuses the gradient of a scalar decay here")
    sizes = (2, 2, 64, 65)
    given = arguments(decay, delta, 200, repeats=repeats, state=True, dtype=torch.bfloat16, sizes=sizes)
    if pattern != "mild":
        given["g"] = patterns(decay, 200, keys=64)[pattern].to(torch.bfloat16)
    given = {name: x.detach().cuda().requires_grad_() for name, x in given.items()}
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv("ISKD_FLA", switch)
        assert on(fla.serve, **given) == (switch == "1")
        outputs = chunk(**given, scale=0.125)
        loss = sum((x * torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)).sum() for x in outputs)
        slopes = dict(zip(given, torch.autograd.grad(loss, [*given.values()]), strict=True))
        results.append({"o": outputs[0], "end": outputs[1], **slopes})
    fast, slow = results
    assert all(x.isfinite().all() for x in fast.values())
    for name, expected in slow.items():
        size = float(expected.float().norm())
        if name == "g" and pattern != "mild":
            size += gradient_of_decay(given, slow)
        assert (fast[name].float() - expected.float()).norm() < 2e-2 * size, name

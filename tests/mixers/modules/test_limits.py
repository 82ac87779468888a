"""What a mixer cannot be made of: settings out of range, classes that are none; and what its report says."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch

import iskd.mixers
from iskd.mixers.base import Attention, RecurrentMixer
from iskd.mixers.delta import DeltaMixer
from iskd.mixers.modules import check_number
from iskd.models import Stack, surgery
from iskd.models.hosting import HostedMixer
from iskd.plan import Convert, Record, Spec
from tests.factories import conf_group, mixer_specs, tiny, windows

SPECS = mixer_specs()
KEYS = {name: set(values) for name, values in conf_group("mixer").items()}


def convert(spec: Spec, family: str = "llama", **config: Any) -> Any:
    """The mixer of a model with one layer, 48 channels wide."""
    model = tiny(family, layers=1, **config)
    surgery.apply(model, Record(1), [Convert(0, spec)])
    return Stack(model).layers[0].get_submodule(f"{Stack(model).family.attn}.mixer")


MODEL = tiny("llama", layers=1)


def refused(spec: Spec, message: str) -> None:
    """A refusal leaves the model as it was, so one will do for all."""
    with pytest.raises(ValueError, match=message):
        surgery.apply(MODEL, Record(1), [Convert(0, spec)])
    assert not any(isinstance(module, HostedMixer) for module in MODEL.modules())


def with_(name: str, **kwargs: Any) -> Spec:
    return Spec(SPECS[name].target, {**SPECS[name].kwargs, **kwargs})


# ---- settings --------------------------------------------------------------------------------------------------------

HUGE = 10**13
COUNTS = {
    "rank": (0, -1, HUGE, 193, 1.5, True, "16"),
    "state": (0, -3, HUGE, 193),
    "shift_rank": (0, -1, HUGE, 193),
    "feature_dim": (0, -1, 129, HUGE),
    "window": (0, -1, 1_000_001, HUGE, 2.5),
    "sinks": (-1, 1_000_001, HUGE, 1.5),
    "steps": (0, 9, HUGE, 1.5),
    "conv": (-1, 1025, HUGE, 1.5),
    "chunk": (0, -1, 1_000_001, HUGE, 1.5),
}
LIMITS = {
    "rank": "1 to 192",
    "state": "1 to 192",
    "shift_rank": "1 to 192",
    "feature_dim": "1 to 128",
    "window": "1 to 1000000",
    "sinks": "0 to 1000000",
    "steps": "1 to 8",
    "conv": "0 to 1024",
    "chunk": "1 to 1000000",
}
NUMBERS = {
    "memory": ((0, -1.0, 0.5, 1e30, 1e7, float("inf"), float("nan"), "long"), "1 to 1e.06"),
    "temper": ((0.0, -1, 0.5, 101, 1e30, float("nan")), "1 to 100"),
    "eps": ((0.0, -1e-6, 2, float("nan")), "1e-12 to 1"),
}
UNSHOWN = {"linear_attention": {"eps"}, "hedgehog": {"eps"}, "rebased": {"eps"}, "rwkv6": {"shift_rank"}}


@pytest.mark.parametrize("name", SPECS)
def test_a_setting_out_of_range_is_named_with_its_limits(name: str) -> None:
    keys = KEYS[name] | UNSHOWN.get(name, set())
    for key in keys & set(COUNTS):
        for value in COUNTS[key]:
            refused(with_(name, **{key: value}), rf"mixer\.{key} must be a whole number from {LIMITS[key]}, got ")
    for key in keys & set(NUMBERS):
        values, limits = NUMBERS[key]
        for value in values:
            refused(with_(name, **{key: value}), rf"mixer\.{key} must be a number from {limits}, got ")


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_settings_at_their_limits_work(name: str) -> None:
    """The window's upper limit excepted: its cache takes as many tokens."""
    ends: dict[str, tuple[Any, ...]] = {
        "rank": (1, 192),
        "state": (1, 192),
        "steps": (1, 8),
        "shift_rank": (1, 192),
        "chunk": (1, 10**6),
    }
    ends |= {"memory": (1.0, 1e6), "temper": (1, 100), "feature_dim": (1, 128), "eps": (1e-12, 1), "conv": (0, 1024)}
    # a bound of 0.5, where one token of memory asks for a forget gate of 0.37
    ends |= {"memory": (2, 1e6)} if name == "hgrn2" else {}
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0))
    for end in (0, 1):
        given = {key: values[end] for key, values in ends.items() if key in KEYS[name]}
        # an activation behind convolutions that are not there is refused
        given |= {"conv_activation": "identity"} if given.get("conv") == 0 and "conv_activation" in KEYS[name] else {}
        assert convert(with_(name, **given))(x).isfinite().all(), given


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ValueError, match=r"mixer\.memory must be a number from 1 to 2, got 1{50}$"):
        check_number("memory", int("1" * 400), 1, 2)


# ---- classes ---------------------------------------------------------------------------------------------------------


def named() -> dict[type, str]:
    """Every class that a record could name below iskd.mixers."""
    names = [found.name for found in pkgutil.iter_modules(iskd.mixers.__path__)]
    modules = [importlib.import_module(f"iskd.mixers.{name}") for name in names]
    return {
        kind: f"{module.__name__}.{key}"
        for module in modules
        for key, kind in inspect.getmembers(module, inspect.isclass)
    }


@torch.no_grad()
def test_what_is_no_mixer_is_refused_and_every_mixer_runs() -> None:
    mixers = {Spec(spec.target).resolve() for spec in SPECS.values()}
    kinds = named()
    assert mixers < set(kinds)
    for kind, target in kinds.items():
        # DeltaMixer, the base of four, is DeltaNet itself
        if kind in mixers or kind is DeltaMixer:
            model = tiny("llama", layers=1)
            surgery.apply(model, Record(1), [Convert(0, Spec(target))])
            assert model(windows()).logits.isfinite().all()
        else:
            refused(Spec(target), "is no mixer|outside the allow-list")
    for target in (
        "modules.projections.Projections",
        "base.RecurrentMixer",
        "gla.RecurrentMixer",
        "modules.layers.ShortConv",
    ):
        refused(Spec(f"iskd.mixers.{target}"), rf"iskd\.mixers\..*{target.rpartition('.')[2]} is no mixer")


def test_a_subclass_needs_streams_of_its_own() -> None:
    class Empty(RecurrentMixer):
        """A mixer that is not written yet."""

    stack = Stack(tiny("llama", layers=1))
    attention = stack.layers[0].get_submodule(stack.family.attn)
    with pytest.raises(ValueError, match=r"Empty is no mixer: it has no `streams` of its own"):
        Empty.from_attention(attention, stack)
    assert Empty(Attention(attention, stack)).report, "what it has of one may be looked at"


# ---- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_a_report_says_that_heads_are_regrouped(name: str) -> None:
    """The tiny Llama has 6 query heads for 3 key-value heads."""
    lines = dict(line.split(" ", 1) for line in convert(with_(name, heads=4)).report)
    for letter in "qkv":
        line = lines[f"{letter}_proj"]
        if line.startswith("copied"):
            repeated = "" if letter == "q" else ": the attention's 3 heads, each 2 times"
            assert line == f"copied, regrouped into 4 heads{repeated}"
    assert lines["o_proj"] == "copied"
    assert not any("regrouped" in line for line in convert(SPECS[name]).report)
    assert not any("regrouped" in line for line in convert(with_(name, heads=4, init="random")).report)


@pytest.mark.parametrize(("family", "turns"), [("gpt2", False), ("opt", False), ("llama", True), ("gpt_neox", True)])
def test_a_report_speaks_of_rotary_positions_where_there_are_some(family: str, turns: bool) -> None:
    for name, spec in SPECS.items():
        mixer = convert(spec, family)
        lines = [line for line in mixer.report if line.startswith("rotary")]
        # of mlstm_window the softmax turns, though its memory does not
        kept = spec.kwargs.get("rotary", False) or name == "mlstm_window"
        assert mixer.turns == (kept and turns), name
        assert len(lines) == turns, name
        assert not turns or lines[0].startswith("rotary copied" if kept else "rotary not used: ")

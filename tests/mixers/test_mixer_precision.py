"""What half precision may cost a mixer: digits, but neither signs nor gradients nor the kernels."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from iskd.mixers.base import Context
from iskd.mixers.ops import fla
from iskd.models import Stack, surgery
from iskd.plan import Convert, Record, Spec
from tests.factories import FAMILIES, louder, mixer_specs, padded, tiny, windows

SPECS = {**mixer_specs(), "rwkv6 shifted": Spec("iskd.mixers.rwkv6.RWKV6", {"token_shift": True, "chunk": 5})}
# laws about hosts: two mixers, one grouped and one with gates, in every family, and all others in two
WIDE = ("linear_attention", "gla")
EVERY = [
    pytest.param(family, name, id=f"{family}-{name}")
    for name in SPECS
    for family in (FAMILIES if name in WIDE else ("llama", "gpt2"))
]


def converted(family: str, spec: Spec, layers: tuple[int, ...] = (0,), count: int = 1, **config: Any) -> Any:
    model = tiny(family, layers=count, **config)
    surgery.apply(model, Record(count), [Convert(layer, spec, seed=layer) for layer in layers])
    return model


def mixer_in(model: Any, layer: int = 0) -> Any:
    stack = Stack(model)
    return stack.layers[layer].get_submodule(f"{stack.family.attn}.mixer")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def loud(mixer: Any) -> Any:
    """Noise on all weights, most on those that start at zero; all are what bfloat16 can hold."""
    for seed, parameter in enumerate(mixer.parameters()):
        parameter.add_((0.2 if parameter.any() else 1.0) * randn(*parameter.shape, seed=seed))
        parameter.copy_(parameter.bfloat16())
    return mixer


def off(found: Tensor, wanted: Tensor) -> float:
    """Deviation, as a share of the size of what is wanted."""
    return float((found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_bfloat16_costs_a_few_percent_at_most(name: str, family: str) -> None:
    """All in bfloat16, and under autocast: bfloat16 has steps of 0.4 to 0.8 percent."""
    mixer, x = loud(mixer_in(converted(family, SPECS[name]))), randn(2, 32, 48).bfloat16()
    wanted = mixer(x.float())
    assert off(copy.deepcopy(mixer).bfloat16()(x), wanted) < 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert off(mixer(x.float()), wanted) < 0.03


def sums_of(mixer: Any, found: list[Tensor]) -> None:
    """Have the mixer write what its normaliser is given, and what that makes of it, into `found`."""
    streams = mixer.streams

    def watched(x_BTD: Tensor, context: Context) -> Any:
        s = streams(x_BTD, context)

        def normalizer(weights: Tensor) -> Tensor:
            found.extend((weights.detach(), s.normalizer(weights).detach()))
            return s.normalizer(weights)

        return replace(s, normalizer=normalizer)

    mixer.streams = watched


@pytest.mark.parametrize("name", ["rebased", "linear_attention", "hedgehog"])
def test_sums_of_positive_weights_stay_positive_under_autocast(name: str) -> None:
    """Heads that are as wide as usual and many tokens: some queries meet only keys that are almost orthogonal."""
    for seed in range(2):
        spec = replace(SPECS[name], kwargs={**SPECS[name].kwargs, "chunk": 32})
        mixer = mixer_in(converted("llama", spec, hidden=192, heads=12, kv_heads=12, seed=seed))
        x, found, outputs = randn(64, 32, 192, seed=seed).requires_grad_(), [], []
        sums_of(mixer, found)
        for half in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                outputs.append(mixer(x).float())
        for sums, divisors in (found[:2], found[2:]):
            assert sums.min() >= -1e-7
            assert divisors.min() > 0
        # a sum next to eps makes large gradients of small differences, in any precision: there only sizes are alike
        clear = found[0].flatten(2).amin(-1, keepdim=True) > 0.1
        assert clear.float().mean() > 0.9
        for where, share, times in ((torch.ones_like(clear), 2.0, 2.0), (clear, 0.03, 1.1)):
            wanted, given = (torch.autograd.grad((y * where).square().sum(), x, retain_graph=True)[0] for y in outputs)
            assert off(given, wanted) < share
            assert given.abs().max() < times * wanted.abs().max()


def test_a_sum_below_zero_is_none() -> None:
    mixer = mixer_in(converted("llama", SPECS["rebased"]))
    x = randn(1, 3, 48)
    normalizer = mixer.streams(x, Context.of(x, None, None)).normalizer
    assert normalizer(torch.tensor([-1e-5, 0.0, 1.0])).tolist() == pytest.approx([1e-5, 1e-5, 1.0], rel=1e-4)


# ---- what the kernels are handed -------------------------------------------------------------------------------------

HALF, FULL = torch.bfloat16, torch.float32
# q, k and v; None = the kernels are not asked. All others hand over one half dtype.
HANDED = {
    "rebased": (FULL, FULL, HALF),  # features that must not be rounded
    "mamba": None,  # a scan of its own
    "window": None,  # softmax alone
    "rwkv6": None,  # its bonus stays in torch
    "rwkv6 shifted": None,
}


@pytest.mark.parametrize(
    ("family", "config"), [*((family, {}) for family in FAMILIES), ("phi", {"qk_layernorm": True})]
)
@torch.no_grad()
def test_the_kernels_get_one_half_dtype(family: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In every family, with and without padding and rotary positions, as autocast and as bfloat16 weights make it."""
    seen: list[tuple[torch.dtype, ...]] = []
    monkeypatch.setattr(fla, "serve", lambda x, *_: seen.append((x.q.dtype, x.k.dtype, x.v.dtype)))
    ids, mask, positions = padded()
    for name, spec in SPECS.items():
        model = converted(family, spec, **config)
        wanted = HANDED.get(name, (HALF, HALF, HALF))
        with torch.autocast("cpu", dtype=HALF):
            model(ids)
            model(ids, attention_mask=mask, position_ids=positions)
        model.bfloat16()(ids)
        assert seen == ([wanted] * 3 if wanted else []), name
        seen.clear()


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "linear_attention", "mamba2"])
@torch.no_grad()
def test_rotary_positions_keep_the_dtype(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, ...]] = []
    monkeypatch.setattr(fla, "serve", lambda x, *_: seen.append((x.q.dtype, x.k.dtype, x.v.dtype)))
    model = converted("qwen3", replace(SPECS[name], kwargs={**SPECS[name].kwargs, "rotary": True}))
    with torch.autocast("cpu", dtype=HALF):
        model(windows())
    assert seen == [(HALF, HALF, HALF)]


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_half_precision_stays_finite(family: str, name: str) -> None:
    model, ids = louder(converted(family, SPECS[name], (0, 2), 4)), windows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    assert output.logits.isfinite().all()
    mixers = [mixer_in(model, layer) for layer in (0, 2)]
    assert all(p.grad is not None and p.grad.isfinite().all() for mixer in mixers for p in mixer.parameters())
    with torch.no_grad():
        assert (output.logits.float() - model(ids).logits).abs().max() < 0.2
        half = model.bfloat16()(ids).logits
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()

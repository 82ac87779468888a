"""Linear attention with every feature map against its sums, and activations behind short convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.mixers.gla import GLA
from iskd.mixers.linear_attention import MAPS, LinearAttention
from iskd.mixers.modules.features import T2R, Hadamard, dpfp
from iskd.mixers.retnet import RetNet
from tests.mixers.test_mixer_kinds import agree, fresh, made, projected, randn


def features(mixer: Any, name: str, x: Tensor, head: int) -> Tensor:
    """Phi of one token of one head, written out."""
    if mixer.feature_map == "hadamard":
        part = getattr(mixer, f"{name}_map")
        one, other = (x @ w[head] + b[head] for w, b in zip(part.weight, part.bias, strict=True))
        return one * other
    if mixer.feature_map == "t2r":
        return F.relu(x @ getattr(mixer, f"{name}_map").weight[head])
    if mixer.feature_map == "hedgehog":
        y = x @ getattr(mixer, f"{name}_map").weight[head]
        return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)])
    if mixer.feature_map == "dpfp":
        both = [*F.relu(x), *F.relu(-x)]
        return torch.stack([both[i] * both[i - j] for j in range(1, mixer.nu + 1) for i in range(len(both))])
    return {"elu1": F.elu(x) + 1, "relu": F.relu(x), "identity": x}[mixer.feature_map]


def linear(mixer: Any, x: Tensor) -> Tensor:
    """Query by query over all keys before it."""
    q, k, v = (projected(mixer, name, x) for name in "qkv")
    rows = []
    for b in range(x.shape[0]):
        outputs = []
        for t in range(x.shape[1]):
            heads = []
            for h in range(6):
                g = h // 2
                phi_q = features(mixer, "q", q[b, t, h], h)
                weights = torch.stack([phi_q @ features(mixer, "k", k[b, s, g], g) for s in range(t + 1)])
                weights = weights / (weights.sum() + mixer.eps) if mixer.normalize else weights * 8**-0.5
                heads.append(weights @ v[b, : t + 1, g])
            outputs.append(torch.cat(heads))
        rows.append(torch.stack(outputs))
    return mixer.projections.o_proj(torch.stack(rows))


@pytest.mark.parametrize("name", ["hadamard", "t2r", "dpfp"])
def test_weights_are_products_of_features(name: str) -> None:
    options: dict[str, Any] = {"hadamard": {"normalize": False}, "t2r": {"normalize": False}, "dpfp": {"nu": 2}}[name]
    agree(made(LinearAttention, feature_map=name, conv=3, conv_activation="silu", **options), linear)


def test_fresh_maps_are_the_identity() -> None:
    x = randn(2, 3, 6, 8, seed=0)
    assert torch.equal(Hadamard(6, 8).double()(x), x)
    assert torch.equal(T2R(6, 8).double()(x), F.relu(x))
    assert dpfp(x).shape == (2, 3, 6, 64)
    assert (dpfp(x) >= 0).all()


@pytest.mark.parametrize("kind", [GLA, RetNet, LinearAttention])
def test_an_activation_stands_behind_the_convolution(kind: Any) -> None:
    """A fresh convolution is the identity, so that what is left is the activation of the projection."""
    mixer, x = fresh(kind, conv=4, conv_activation="silu"), randn(1, 5, 48, seed=0)
    context = type("Context", (), {"conv": lambda _self, _conv, y: y, "positions": torch.arange(5)[None]})()
    found = mixer.project("v", x, context)
    torch.testing.assert_close(found.flatten(2), F.silu(mixer.projections.v_proj(x)))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"feature_map": "cosine"}, f"choose one of {', '.join(MAPS)}"),
        ({"feature_map": "hadamard"}, "mixer.normalize=true needs weights that are not negative"),
        ({"feature_map": "dpfp", "nu": 0}, "mixer.nu must be a whole number from 1 to 16"),
        ({"conv": 4, "conv_activation": "tanh"}, "mixer.conv_activation='tanh': choose one of silu, identity"),
        ({"conv_activation": "silu"}, "mixer.conv=0 has none; set mixer.conv=4"),
    ],
)
def test_what_cannot_be_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(LinearAttention, **kwargs)

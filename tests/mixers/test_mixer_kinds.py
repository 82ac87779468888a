"""Each mixer against the recurrence of its paper, token after token and head after head, in float64.

What holds for every mixer (causality, padding, caches, `matrix`, reports, records) is in test_mixers.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import RecurrentMixer
from iskd.mixers.deltanet import DeltaNet, DeltaProduct
from iskd.mixers.gated_deltanet import GatedDeltaNet
from iskd.mixers.kda import KDA
from iskd.mixers.mamba import Mamba, scan
from iskd.mixers.mamba2 import DiscreteMamba2, Mamba2
from iskd.mixers.mlstm import MLSTM
from iskd.mixers.ops.scan import scan as by_token
from iskd.mixers.rwkv6 import RWKV6
from iskd.mixers.sliding import Sliding
from iskd.models import Stack
from tests.factories import tiny

ALL: tuple[type[RecurrentMixer], ...] = (
    *(DeltaNet, DeltaProduct, GatedDeltaNet, KDA, Mamba, Mamba2, DiscreteMamba2, MLSTM, RWKV6, Sliding),
)
TOKENS = 11


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(kind: type[RecurrentMixer], family: str = "llama", **kwargs: Any) -> RecurrentMixer:
    """The untrained mixer of the second block of a tiny model (6 query heads and 3 key-value heads of 8), float64."""
    stack = Stack(tiny(family))
    torch.manual_seed(0)
    attention = stack.layers[1].get_submodule(stack.family.attn)
    return kind.from_attention(attention, stack, **{"chunk": 4, **kwargs}).double()


@torch.no_grad()
def made(kind: type[RecurrentMixer], family: str = "llama", **kwargs: Any) -> Any:
    """The same with noise on all weights: no gate is constant, no convolution the identity."""
    mixer = fresh(kind, family, **kwargs)
    for seed, parameter in enumerate(mixer.parameters()):
        parameter.add_(0.3 * randn(*parameter.shape, seed=seed))
    return mixer


def agree(mixer: RecurrentMixer, reference: Any) -> None:
    """Outputs, and gradients of the stream and of every parameter."""
    x = randn(2, TOKENS, 48, seed=5).requires_grad_()
    wanted = {"x": x, **dict(mixer.named_parameters())}
    values = [mixer(x), reference(mixer, x)]
    gradients = [torch.autograd.grad((y * randn(2, TOKENS, 48, seed=6)).sum(), list(wanted.values())) for y in values]
    torch.testing.assert_close(values[0], values[1], atol=1e-9, rtol=1e-9)
    for name, fast, slow in zip(wanted, *gradients, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-8, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
        assert fast.abs().max() > 0, name


def projected(mixer: Any, name: str, x: Tensor, activation: Any = lambda y: y) -> Tensor:
    """Projection, convolution tap by tap and activation, as [B, T, heads, width]."""
    y = getattr(mixer.projections, f"{name}_proj")(x)
    if name in mixer.convs:
        taps, rows = mixer.convs[name].weight, []
        for t in range(y.shape[1]):
            ago = [(n, t - n) for n in range(taps.shape[1]) if t - n >= 0]
            rows.append(sum((taps[:, -1 - n] * y[:, s] for n, s in ago), torch.zeros_like(y[:, 0])))
        y = mixer.conv_activation(torch.stack(rows, dim=1))
    if mixer.rotary is not None and name != "v":  # heads of the attention are turned, whatever heads the mixer has
        y = mixer.rotary(y.unflatten(-1, (-1, 8)), torch.arange(y.shape[1])[None]).flatten(2)
    return activation(y).unflatten(-1, (-1, mixer.head_dim))


def recur(q: Tensor, token: Any, shape: tuple[int, int] = (8, 8)) -> Tensor:
    """Outputs [B, T, H, V] of `token(b, t, h, state) -> (output [V], state)` from a state of zeros."""
    rows = []
    for b in range(q.shape[0]):
        columns = []
        for h in range(q.shape[2]):
            state, outputs = q.new_zeros(shape), []
            for t in range(q.shape[1]):
                o, state = token(b, t, h, state)
                outputs.append(o)
            columns.append(torch.stack(outputs))
        rows.append(torch.stack(columns, dim=1))
    return torch.stack(rows)


def normed(mixer: Any, o: Tensor, *, centre: bool = False) -> Tensor:
    if centre:
        o = o - o.mean(-1, keepdim=True)
    return o / (o.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * mixer.norm.weight


def gated(mixer: Any, o: Tensor, x: Tensor, activation: Any = F.silu) -> Tensor:
    return o * activation(mixer.gate.proj(x)).unflatten(-1, (-1, mixer.head_dim))


# ---- the delta rule --------------------------------------------------------------------------------------------------


def delta(mixer: Any, x: Tensor) -> Tensor:
    """S = (I - beta k k^T) diag(a) S + beta k v^T with a = 1 (DeltaNet), a number (Gated DeltaNet), a vector (KDA)."""
    q, k, v = (projected(mixer, name, x, mixer.activation) for name in "qkv")
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    beta, decay = mixer.most * torch.sigmoid(mixer.beta(x)), torch.ones_like(k)
    if not isinstance(mixer, DeltaNet):
        steps = F.softplus(mixer.decay.proj(x)).unflatten(-1, (6, -1))
        decay = torch.exp(-torch.exp(mixer.decay.A_log)[:, None] * steps)
        decay = decay.repeat_interleave(8 // decay.shape[-1], -1)  # of a head, of a group of channels, of each

    def token(b: int, t: int, h: int, state: Tensor) -> tuple[Tensor, Tensor]:
        key, strength = k[b, t, h], beta[b, t, h]
        state = decay[b, t, h][:, None] * state
        state = state - strength * torch.outer(key, key @ state) + strength * torch.outer(key, v[b, t, h])
        return 8**-0.5 * q[b, t, h] @ state, state

    o = normed(mixer, recur(q, token))
    if isinstance(mixer, GatedDeltaNet):
        o = gated(mixer, o, x)
    if isinstance(mixer, KDA):
        o = o * torch.sigmoid(mixer.out_gate(x)).unflatten(-1, (6, 8))
    return mixer.projections.o_proj(o.flatten(2))


@pytest.mark.parametrize("kind", [DeltaNet, GatedDeltaNet, KDA])
@pytest.mark.parametrize("options", [{}, {"activation": "identity", "conv": 0}], ids=["silu", "plain"])
def test_the_delta_rule_replaces_what_a_key_finds(kind: type[RecurrentMixer], options: dict[str, Any]) -> None:
    agree(made(kind, **options), delta)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(GatedDeltaNet, {"group": 4}), (GatedDeltaNet, {"group": 1}), (DeltaNet, {}), (KDA, {"conv": 0})],
)
def test_groups_of_channels_and_negative_eigenvalues(kind: type[RecurrentMixer], options: dict[str, Any]) -> None:
    mixer = made(kind, negative_eigenvalues=True, **options)
    agree(mixer, delta)
    fresh_one = fresh(kind, negative_eigenvalues=True, **options)
    torch.testing.assert_close(2 * torch.sigmoid(fresh_one.beta.bias), torch.full((6,), 0.5, dtype=torch.float64))  # type: ignore[operator, union-attr]


def test_groups_between_a_head_and_a_channel() -> None:
    """One group is the published mixer, and its decay is a number a head."""
    assert fresh(GatedDeltaNet, group=8).decay.proj.bias.shape == (6,)  # type: ignore[union-attr]
    assert fresh(GatedDeltaNet, group=2).decay.proj.bias.shape == (24,)  # type: ignore[union-attr]
    for group, message in ((3, "mixer.group=3 does not divide the 8"), (9, "mixer.group must be a whole number from")):
        with pytest.raises(ValueError, match=message):
            fresh(GatedDeltaNet, group=group)


def product(mixer: Any, x: Tensor) -> Tensor:
    """N rules a token, one after the other: the decay before the first, the query after the last."""
    n = mixer.steps
    q = projected(mixer, "q", x, mixer.activation)
    q = q / q.norm(dim=-1, keepdim=True)
    keys, values = [projected(mixer, "k", x, mixer.activation)], [projected(mixer, "v", x, mixer.activation)]
    betas = [mixer.beta(x)]
    for step in mixer.later:
        twin = SimpleNamespace(
            projections=step,
            convs=step.convs,
            head_dim=mixer.head_dim,
            rotary=mixer.rotary,
            conv_activation=mixer.conv_activation,
        )
        keys.append(projected(twin, "k", x, mixer.activation))
        values.append(projected(twin, "v", x, mixer.activation))
        betas.append(step.beta(x))
    decay = torch.ones_like(betas[0])
    if mixer.decay is not None:
        decay = torch.exp(-torch.exp(mixer.decay.A_log) * F.softplus(mixer.decay.proj(x)))

    def token(b: int, t: int, h: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = decay[b, t, h] * state
        for j in range(n):
            key, strength = keys[j][b, t, h] / keys[j][b, t, h].norm(), mixer.most * torch.sigmoid(betas[j][b, t, h])
            state = state - strength * torch.outer(key, key @ state) + strength * torch.outer(key, values[j][b, t, h])
        return mixer.head_dim**-0.5 * q[b, t, h] @ state, state

    o = normed(mixer, recur(q, token, (mixer.head_dim,) * 2))
    return mixer.projections.o_proj((gated(mixer, o, x) if mixer.gate is not None else o).flatten(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 3, "conv": 0, "decay": False, "gate": False, "negative_eigenvalues": False},
        {"steps": 1},
        {"steps": 3, "conv_activation": "silu", "activation": "identity"},
        {"steps": 2, "rotary": True},
        {"steps": 2, "rotary": True, "heads": 3},
        {"steps": 2, "rotary": True, "heads": 12},
    ],
)
def test_deltaproduct_replaces_several_times_a_token(options: dict[str, Any]) -> None:
    agree(made(DeltaProduct, **options), product)


@torch.no_grad()
def test_a_value_written_with_beta_1_is_found_again() -> None:
    """What the rule is for: a key written twice holds the second value alone, not the sum."""
    mixer = fresh(DeltaNet, "gpt2", activation="identity", conv=0)
    nn.init.constant_(mixer.get_submodule("beta").get_parameter("bias"), 50.0)
    x = randn(1, 2, 48, seed=0)
    projections = mixer.projections
    for name in ("q_proj", "k_proj"):  # every token has the same key, its own query
        projections.get_submodule(name).get_parameter("weight").zero_()
        projections.get_submodule(name).get_parameter("bias").fill_(1.0)
    values = projections.get_submodule("v_proj")(x).unflatten(-1, (6, 8))
    torch.testing.assert_close(mixer(x), mixer.output(8**-0.5 * values, x, None), atol=1e-9, rtol=1e-9)  # type: ignore[arg-type]


# ---- state spaces ----------------------------------------------------------------------------------------------------


def mamba2(mixer: Any, x: Tensor) -> Tensor:
    """S = exp(dt A) S + dt B x^T, o = C^T S + D x, norm of o * silu(z)."""
    c, b_, u = (projected(mixer, name, x, mixer.activation) for name in "qkv")
    dt = F.softplus(mixer.dt(x))
    decay = torch.exp(-torch.exp(mixer.A_log) * dt)

    def token(b: int, t: int, h: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = decay[b, t, h] * state + torch.outer(b_[b, t, h], dt[b, t, h] * u[b, t, h])
        return 8**-0.5 * c[b, t, h] @ state + mixer.D[h] * u[b, t, h], state

    o = normed(mixer, gated(mixer, recur(c, token), x))
    return mixer.projections.o_proj(o.flatten(2))


@pytest.mark.parametrize("options", [{"activation": "silu"}, {"conv": 0}], ids=["silu", "plain"])
def test_mamba2_is_a_state_space(options: dict[str, Any]) -> None:
    agree(made(Mamba2, **options), mamba2)


def discrete_mamba2(mixer: Any, x: Tensor) -> Tensor:
    """S = exp(-a) S + B x^T, o = C^T S + D x, o * silu(z): the step size a is in the decay alone."""
    c, b_, u = (projected(mixer, name, x, mixer.activation) for name in "qkv")
    decay = torch.exp(-F.softplus(mixer.decay(x)))

    def token(b: int, t: int, h: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = decay[b, t, h] * state + torch.outer(b_[b, t, h], u[b, t, h])
        return 8**-0.5 * c[b, t, h] @ state + mixer.D[h] * u[b, t, h], state

    return mixer.projections.o_proj(gated(mixer, recur(c, token), x).flatten(2))


@pytest.mark.parametrize("options", [{}, {"activation": "silu", "conv": 0}], ids=["identity", "silu"])
def test_discrete_mamba2_decays_by_its_step_alone(options: dict[str, Any]) -> None:
    agree(made(DiscreteMamba2, **options), discrete_mamba2)


def test_mamba2_leaves_the_copies_whole_unless_it_is_told_otherwise() -> None:
    assert torch.equal(fresh(Mamba2).activation(torch.tensor([-1.0])), torch.tensor([-1.0]))  # type: ignore[operator]


def mamba(mixer: Any, x: Tensor) -> Tensor:
    """Per channel: h = exp(dt A) h + dt B u, y = C^T h + D u."""
    u = projected(mixer, "v", x, mixer.activation).flatten(2)
    low, b_, c = mixer.select(u).split(mixer.sizes, dim=-1)
    dt, rate = F.softplus(mixer.dt(low)), -torch.exp(mixer.A_log)
    rows = []
    for b in range(x.shape[0]):
        h, outputs = x.new_zeros(rate.shape), []
        for t in range(x.shape[1]):
            h = torch.exp(dt[b, t, :, None] * rate) * h + (dt[b, t] * u[b, t])[:, None] * b_[b, t]
            outputs.append(h @ c[b, t] + mixer.D * u[b, t])
        rows.append(torch.stack(outputs))
    o = gated(mixer, torch.stack(rows).unflatten(-1, (6, 8)), x)
    return mixer.projections.o_proj(o.flatten(2))


@pytest.mark.parametrize("options", [{}, {"activation": "identity", "conv": 0, "state": 3, "rank": 2}])
def test_mamba_scans_every_channel(options: dict[str, Any]) -> None:
    agree(made(Mamba, **options), mamba)


def test_a_scan_survives_any_decay() -> None:
    """Steps from 0 to those whose decay is 0 in float32: values and gradients stay finite and right."""
    dt = torch.tensor([0.0, 1e-6, 1.0, 1e3, 1e6, 0.5, 1e-3])[None, :, None].repeat(1, 1, 2).requires_grad_()
    x, b, c = (torch.randn(1, 7, n, generator=torch.Generator().manual_seed(n)) for n in (2, 3, 3))
    begins, rate, state = torch.zeros(1, 7, dtype=torch.bool), -torch.ones(2, 3), torch.ones(1, 2, 3)
    o, _ = scan(dt, x, b, c, begins, rate, state)
    h, slow = state[0], []
    for t in range(7):
        h = torch.exp(dt[0, t, :, None] * rate) * h + x[0, t, :, None] * b[0, t]
        slow.append(h @ c[0, t])
    torch.testing.assert_close(o[0], torch.stack(slow))
    gradients = [torch.autograd.grad(y.sum(), dt)[0] for y in (o, torch.stack(slow))]
    torch.testing.assert_close(*gradients)
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("size", [1, 3, 64])
def test_both_scans_are_one(size: int) -> None:
    """By doubling and token after token, with documents that begin inside and on the border of a chunk."""
    names = {"dt": (2, 7, 3), "x": (2, 7, 3), "b": (2, 7, 4), "c": (2, 7, 4), "rate": (3, 4), "state": (2, 3, 4)}
    given = {name: randn(*shape, seed=seed) for seed, (name, shape) in enumerate(names.items())}
    given |= {"dt": given["dt"].square(), "rate": -given["rate"].square()}
    begins = torch.tensor([[0, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0]]).bool()
    leaves = [x.requires_grad_() for x in given.values()]
    dt, x, b, c, rate, state = leaves
    results = [scan(dt, x, b, c, begins, rate, state), by_token(dt, x, b, c, begins, rate, state, size)]
    weights = randn(2, 7, 3, seed=8), randn(2, 3, 4, seed=9)
    slopes = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(found, weights, strict=True)), leaves)  # type: ignore[arg-type]
        for found in results
    ]
    torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-10, rtol=1e-9)
    with torch.no_grad():
        assert torch.equal(by_token(dt, x, b, c, begins, rate, state, size)[0], results[1][0])


def test_mamba_has_no_matrix() -> None:
    with pytest.raises(ValueError, match="Mamba has no mixing matrix per head"):
        fresh(Mamba).matrix(randn(1, 3, 48, seed=0))


# ---- gates -----------------------------------------------------------------------------------------------------------


def mlstm(mixer: Any, x: Tensor) -> Tensor:
    """The stabilised form of the paper: a running maximum m scales state and normaliser, and bounds by exp(-m)."""
    q, k, v = (projected(mixer, name, x).repeat_interleave(6 // mixer.kv_heads, 2) for name in "qkv")
    i, f = (15 * torch.tanh(gate(x) / 15) for gate in (mixer.input_gate, mixer.forget_gate))
    rows = []
    for b in range(x.shape[0]):
        columns = []
        for h in range(6):
            state, n, m, outputs = x.new_zeros(8, 8), x.new_zeros(8), x.new_zeros(()), []
            for t in range(x.shape[1]):
                key, query, log_f = k[b, t, h] / 8**0.5, q[b, t, h], F.logsigmoid(f[b, t, h])
                last, m = m, torch.maximum(log_f + m, i[b, t, h]) if t else i[b, t, h]
                keep = torch.exp(log_f + last - m) if t else torch.zeros_like(m)
                write = torch.exp(i[b, t, h] - m)
                state, n = keep * state + write * torch.outer(key, v[b, t, h]), keep * n + write * key
                outputs.append(query @ state / torch.maximum((query @ n).abs(), torch.exp(-m)))
            columns.append(torch.stack(outputs))
        rows.append(torch.stack(columns, dim=1))
    o = gated(mixer, normed(mixer, torch.stack(rows), centre=True), x, torch.sigmoid)
    return mixer.projections.o_proj(o.flatten(2))


def test_mlstm_needs_no_running_maximum() -> None:
    mixer = made(MLSTM)
    with torch.no_grad():  # gates far from their start, some at the cap
        mixer.input_gate.weight.mul_(8)
        mixer.forget_gate.bias.sub_(4)
    agree(mixer, mlstm)


def rwkv6(mixer: Any, x: Tensor) -> Tensor:
    """S = diag(w) S + k v^T, o = r^T (S before + diag(u) k v^T), every input its own mix of the token and the last."""
    source = dict.fromkeys("rwkvg", x)
    if mixer.shift is not None:
        back = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1) - x
        low = torch.tanh(mixer.shift.down(x + back * mixer.shift.inner)).chunk(5, dim=-1)
        mixes = [mixer.shift.outer[c] + low[c] @ mixer.shift.up[c] for c in range(5)]
        source = {name: x + back * mix for name, mix in zip("rwkvg", mixes, strict=True)}
    r, k, v = (projected(mixer, name, source[name.replace("q", "r")]) for name in "qkv")
    decay = torch.exp(-torch.exp(mixer.decay(source["w"]))).unflatten(-1, (6, 8))

    def token(b: int, t: int, h: int, state: Tensor) -> tuple[Tensor, Tensor]:
        written = torch.outer(k[b, t, h], v[b, t, h])
        o = 8**-0.5 * r[b, t, h] @ (state + mixer.bonus[h][:, None] * written)
        return o, decay[b, t, h][:, None] * state + written

    o = gated(mixer, normed(mixer, recur(r, token), centre=True), source["g"])
    return mixer.projections.o_proj(o.flatten(2))


@pytest.mark.parametrize("token_shift", [False, True])
def test_rwkv6_reads_before_it_writes(token_shift: bool) -> None:
    agree(made(RWKV6, token_shift=token_shift), rwkv6)


@torch.no_grad()
def test_decays_start_at_their_memory() -> None:
    """On a stream of zeros every fresh decay is exp(-1 / memory)."""
    for kind in (GatedDeltaNet, KDA, DeltaProduct, Mamba2, DiscreteMamba2, MLSTM, RWKV6):
        mixer, found = fresh(kind, memory=50.0), {}
        mixer.mix = lambda streams, *_, into=found: (into.update(g=streams.g), streams.v)[1:] * 2  # type: ignore[method-assign]
        mixer(torch.zeros(1, 2, 48, dtype=torch.float64))
        torch.testing.assert_close(found["g"], torch.full_like(found["g"], -1 / 50), atol=1e-6, rtol=1e-6)


# ---- copies ----------------------------------------------------------------------------------------------------------

COPIED = {Mamba: "vo"}


@pytest.mark.parametrize("kind", ALL)
def test_what_is_copied_and_what_is_fresh(kind: type[RecurrentMixer]) -> None:
    mixer = fresh(kind)
    report = dict(line.split(" ", 1) for line in mixer.report)
    for name in "qkvo":
        kept = name in COPIED.get(kind, "qkvo")
        assert report[f"{name}_proj"].startswith("copied" if kept else "dropped: ")
    assert (mixer.rotary is not None) == (kind is Sliding)
    own = {name for name, _ in mixer.named_children() if name not in ("projections", "convs")}
    own = {name for name in own if any(True for _ in mixer.get_submodule(name).parameters())}
    assert all(report[name].startswith("fresh: ") for name in own)


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (DeltaNet, {"activation": "tanh"}, "mixer.activation='tanh': choose one of silu, identity"),
        (Mamba, {"activation": "relu"}, "mixer.activation='relu'"),
    ],
)
def test_what_cannot_be_is_refused(kind: type[RecurrentMixer], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(kind, **kwargs)

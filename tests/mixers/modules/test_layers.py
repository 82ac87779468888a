"""What mixers inherit and share, and the formulas of those that add to a state, token by token in plain sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import Context
from iskd.mixers.modules import HeadNorm, OutputGate, Projections, Rotary, ShortConv
from iskd.mixers.modules.features import Hedgehog, quadratic
from iskd.mixers.modules.layers import gate_proj, logit_of_memory
from iskd.models import Stack, surgery
from iskd.models.families import rotary_of
from iskd.models.projections import weight_of
from iskd.plan import Convert, Record, Spec
from tests.factories import FAMILIES, tiny

TARGETS = {
    "linear": "iskd.mixers.linear_attention.LinearAttention",
    "retnet": "iskd.mixers.retnet.RetNet",
    "gla": "iskd.mixers.gla.GLA",
    "metala": "iskd.mixers.metala.MetaLA",
    "hgrn2": "iskd.mixers.hgrn2.HGRN2",
    "rebased": "iskd.mixers.rebased.ReBased",
}


@torch.no_grad()
def noisy(module: nn.Module) -> Any:
    """Larger weights and no zero biases, in float64."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.double().parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def mixer(kind: str, family: str = "llama", **kwargs: Any) -> Any:
    model = tiny(family)
    surgery.apply(model, Record(4), [Convert(0, Spec(TARGETS[kind], kwargs), seed=3)])
    return noisy(Stack(model).layers[0].get_submodule(f"{Stack(model).family.attn}.mixer"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


# ---- what is inherited -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_projections_are_those_of_the_attention_in_every_family() -> None:
    x = randn(2, 5, 48)
    for family in FAMILIES:
        model = noisy(tiny(family))
        stack = Stack(model)
        block = stack.layers[1]
        attention = block.get_submodule(stack.family.attn)
        copied: Any = Projections.copied(attention, stack)
        projected, dims = [block.get_submodule(path)(x) for path in stack.family.qkv], stack.dims
        # the way in which each family's own attention takes a fused projection apart
        if stack.family.fused == "thirds":
            projected = list(projected[0].split(48, dim=2))
        elif stack.family.fused == "stacked":
            projected = list(projected[0].split([dims.head_dim * n for n in (dims.heads, *[dims.kv_heads] * 2)], dim=2))
        elif stack.family.fused == "heads":
            projected = [x.flatten(2) for x in projected[0].view(2, 5, dims.heads, -1).chunk(3, dim=-1)]
        for own, hosts in zip((copied.q_proj, copied.k_proj, copied.v_proj), projected, strict=True):
            exact(own(x), hosts)
        out = block.get_submodule(stack.family.out)
        mixed = randn(2, 5, weight_of(out).shape[1], seed=1)
        exact(copied.o_proj(mixed), out(mixed))
        assert (copied.heads, copied.kv_heads, copied.head_dim) == (dims.heads, dims.kv_heads, dims.head_dim)
        shared = {p.data_ptr() for p in attention.parameters()} & {p.data_ptr() for p in copied.parameters()}
        assert not shared, "copies: training the student must not move its teacher"
        expanded: Any = Projections.copied(attention, stack, expand=True)
        for own, hosts in ((expanded.k_proj, projected[1]), (expanded.v_proj, projected[2])):
            heads = hosts.unflatten(-1, (dims.kv_heads, -1)).repeat_interleave(dims.heads // dims.kv_heads, dim=2)
            exact(own(x).unflatten(-1, (dims.heads, -1)), heads)


@pytest.mark.parametrize("kind", ["linear", "gla"])
@pytest.mark.parametrize(("family", "config"), [("qwen3", {}), ("phi", {"qk_layernorm": True})])
def test_query_and_key_norms_are_inherited(family: str, config: dict[str, Any], kind: str) -> None:
    model = tiny(family, **config)
    stack = Stack(model)
    old = [stack.layers[0].get_submodule(path).state_dict() for path in stack.family.qk_norms]
    surgery.apply(model, Record(4), [Convert(0, Spec(TARGETS[kind]))])
    new: Any = stack.layers[0].get_submodule(f"{stack.family.attn}.mixer")
    for name, hosts in zip(("q_norm", "k_norm"), old, strict=True):
        own = new.projections.get_submodule(name).state_dict()
        assert own.keys() == hosts.keys()
        assert all(torch.equal(own[key], hosts[key]) for key in hosts)
    assert {"q_norm copied", "k_norm copied"} <= set(new.report)


def test_heads_that_do_not_divide_are_refused() -> None:
    model = tiny("llama")
    stack, attention = Stack(model), model.get_submodule("model.layers.0.self_attn")
    attention.get_submodule("q_proj").weight = nn.Parameter(torch.zeros(40, 48))
    with pytest.raises(ValueError, match="5 query heads for 3 key-value heads, which does not divide"):
        Projections.copied(attention, stack)
    with pytest.raises(ValueError, match=r"mixer\.heads=0 does not divide the 48 channels"):
        Projections.copied(model.get_submodule("model.layers.1.self_attn"), stack, heads=0)


def test_random_weights_are_the_ablation_of_copying() -> None:
    models = [tiny("phi", qk_layernorm=True) for _ in range(2)]
    for model in models:
        noisy(model)
        surgery.apply(model, Record(4), [Convert(0, Spec(TARGETS["linear"], {"init": "random"}), seed=5)])
    first, second = (model.get_submodule("model.layers.0.self_attn.mixer").state_dict() for model in models)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    old = tiny("phi", qk_layernorm=True).get_submodule("model.layers.0.self_attn")
    weight = first["projections.q_proj.weight"]
    assert not torch.allclose(weight, old.get_submodule("q_proj").get_parameter("weight").double(), atol=1e-2)
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not first["projections.q_proj.bias"].any()
    assert torch.equal(first["projections.k_norm.weight"], torch.ones(8, dtype=torch.float64))


# ---- shared layers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_short_convolution_starts_as_the_identity_and_stays_in_its_document() -> None:
    conv, x = ShortConv(3, 4).double(), randn(2, 9, 3)
    context = Context.of(x, None, None)
    assert torch.equal(context.conv(conv, x), x)
    noisy(conv)
    wanted = F.conv1d(F.pad(x.mT, (3, 0)), conv.weight[:, None], groups=3).mT
    exact(Context.of(x, None, None).conv(conv, x), wanted)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    split = Context.of(x, None, positions).conv(conv, x)
    exact(split[1], wanted[1])
    exact(split[:1, :4], wanted[:1, :4])
    exact(split[:1, 4:], Context.of(x[:1, 4:], None, None).conv(conv, x[:1, 4:]))
    first = Context.of(x[:, :2], None, None)
    pieces = [first.conv(conv, x[:, :2])]
    pieces.append(Context.of(x[:, 2:], None, None, tuple(first.last)).conv(conv, x[:, 2:]))
    exact(torch.cat(pieces, dim=1), wanted)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gpt2", "opt")])
@torch.no_grad()
def test_rotary_positions_are_the_hosts(family: str) -> None:
    """Softmax over the mixer's own q and k is the attention itself, also where not the whole head is turned."""
    model = tiny(family)
    stack, x, positions = Stack(model), torch.randn(2, 7, 48), torch.arange(3, 10)[None]
    block = noisy(stack.layers[0]).float()
    attention = block.get_submodule(stack.family.attn)
    kind = rotary_of(stack.config, getattr(attention, "layer_type", None))
    turn = stack.base.get_submodule(str(stack.family.rotary))(x, positions, *kind)
    vars(attention).update(attn_logit_softcapping=None)  # of Gemma 2, of which linear attention knows nothing
    hidden = torch.full((7, 7), -1e30).triu(1)[None, None]
    wanted = attention(x, position_embeddings=turn, attention_mask=hidden)[0]
    spec = Spec(TARGETS["linear"], {"rotary": True})
    made: Any = spec.resolve().from_attention(attention, stack, **spec.kwargs)  # type: ignore[attr-defined]
    q, k, v = made.qkv(x, Context.of(x, None, positions))
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (y.transpose(1, 2) for y in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=made.scale).transpose(1, 2)
    torch.testing.assert_close(made.projections.out(mixed), wanted, atol=1e-5, rtol=1e-4)
    assert "rotary copied" in made.report
    assert isinstance(made.rotary, Rotary)
    assert not any("rotary" in key for key in made.state_dict())
    with pytest.raises(ValueError, match=r"mixer\.rotary=true turns .* HGRN2 has keys of its own"):
        Spec(TARGETS["hgrn2"]).resolve().from_attention(attention, stack, rotary=True)  # type: ignore[attr-defined]


def test_gates_start_open_and_decays_near_one() -> None:
    o, x = randn(2, 3, 4, 5), randn(2, 3, 7)
    torch.testing.assert_close(OutputGate(7, 20).double()(o, x), o, rtol=1e-6, atol=0)
    torch.testing.assert_close(OutputGate(7, 20, "sigmoid").double()(o, x), 0.9526 * o, rtol=1e-4, atol=0)
    logit = torch.tensor(logit_of_memory(100, 16), dtype=torch.float64)
    assert (F.logsigmoid(logit) / 16).item() == pytest.approx(-1 / 100)
    torch.manual_seed(0)
    for rank in (None, 2):
        fresh = gate_proj(7, 6, rank=rank, bias=2.5).double()(x)
        assert (fresh - 2.5).abs().max() < 0.2
        assert fresh.std() > 0


def test_a_head_norm_starts_at_the_size_of_the_values() -> None:
    norm, o = HeadNorm(6, 8).double(), 30 * randn(500, 4, 6, 8)
    v_proj = randn(3 * 8, 48, seed=1) * torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(8)[:, None]
    norm.size_to(v_proj)
    values = (randn(500, 48, seed=2) @ v_proj.T).unflatten(-1, (3, 8)).square().mean((0, 2)).sqrt()
    sizes = norm(o).square().mean((0, 1, 3)).sqrt()
    torch.testing.assert_close(sizes, values.repeat_interleave(2) / 16, rtol=0.1, atol=0)
    centred = HeadNorm(6, 8, centre=True).double()(o)
    exact(centred, F.layer_norm(o, (8,), eps=1e-6))


def test_feature_maps_are_what_they_say() -> None:
    x, y = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    exact((quadratic(x) * quadratic(y)).sum(-1), (x * y).sum(-1).square())
    assert quadratic(x).shape[-1] == 15
    hedgehog = Hedgehog(4, 5).double()
    exact(hedgehog(x), torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1))
    noisy(hedgehog)
    assert hedgehog(x).min() > 0


# ---- formulas --------------------------------------------------------------------------------------------------------


def per_head(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copied q, k, v [B, T, H, K], key-value heads repeated."""
    context, repeats = Context.of(x, None, None), mixer.heads // mixer.kv_heads
    q, k, v = (mixer.project(name, x, context) for name in "qkv")
    return q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)


def check(mixer: Any, mixed: Any, x: Tensor) -> None:
    """Values and gradients of a mixer are those of its formula."""
    x.requires_grad_()
    wanted = [x, *mixer.parameters()]
    values = [mixer(x), mixed(x)]
    gradients = [torch.autograd.grad((y * randn(*y.shape, seed=1)).sum(), wanted) for y in values]
    for fast, slow in zip((values[0], *gradients[0]), (values[1], *gradients[1]), strict=True):
        exact(fast, slow)


MAPS = {"elu1": lambda x: F.elu(x) + 1, "relu": torch.relu, "identity": lambda x: x}


@pytest.mark.parametrize(
    ("feature_map", "normalize"),
    [("elu1", True), ("elu1", False), ("relu", True), ("relu", False), ("identity", False)],
)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_linear_attention_is_the_matrix_of_its_weights(family: str, feature_map: str, normalize: bool) -> None:
    made = mixer("linear", family, feature_map=feature_map, normalize=normalize, chunk=4)

    def mixed(x: Tensor) -> Tensor:
        q, k, v = per_head(made, x)
        weights = torch.einsum("bthk,bshk->bhts", MAPS[feature_map](q), MAPS[feature_map](k)).tril()
        scale = weights.sum(-1, keepdim=True) + made.eps if normalize else k.shape[-1] ** 0.5
        return made.projections.out(torch.einsum("bhts,bshv->bthv", weights / scale, v))

    check(made, mixed, randn(2, 11, 48))


@torch.no_grad()
def test_with_the_identity_for_a_map_the_copy_is_attention_without_its_softmax() -> None:
    """GPT-2's own attention, its softmax taken out: nothing is lost in copying."""
    model = tiny("gpt2").double()
    attention: Any = model.get_submodule("transformer.h.0.attn")
    x = randn(2, 9, 48)
    q, k, v = (x.unflatten(-1, (6, 8)) for x in attention.c_attn(x).split(48, dim=2))
    weights = (torch.einsum("bthk,bshk->bhts", q, k) / 8**0.5).tril()
    wanted = attention.c_proj(torch.einsum("bhts,bshv->bthv", weights, v).flatten(2))
    spec = Spec(TARGETS["linear"], {"feature_map": "identity", "normalize": False, "conv": 4})
    surgery.apply(model, Record(4), [Convert(0, spec)])
    copied: Any = model.get_submodule("transformer.h.0.attn.mixer")
    exact(copied(x), wanted)
    exact(copied.matrix(x), weights)


def running(mixer: Any, a: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o_t = K^-1/2 q_t^T S_t with S_t = diag(a_t) S_{t-1} + k_t v_t^T, token after token."""
    state, outputs = torch.zeros(*k[:, 0].shape, v.shape[-1], dtype=v.dtype), []
    for t in range(q.shape[1]):
        state = a[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(2) * mixer.head_dim**-0.5)
    return torch.stack(outputs, dim=1)


def written(mixer: Any, o: Tensor, x: Tensor, *, centre: bool = False) -> Tensor:
    """Norm per head, gate and output projection."""
    o = o - o.mean(-1, keepdim=True) if centre else o
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    if mixer.gate is not None:
        o = o * F.silu(mixer.gate.proj(x)).view(o.shape)
    return mixer.projections.out(o)


@pytest.mark.parametrize("gate", [True, False])
def test_retention_decays_by_a_constant(gate: bool) -> None:
    made = mixer("retnet", gate=gate, chunk=4)
    assert (made.gate is not None) == gate

    def mixed(x: Tensor) -> Tensor:
        q, k, v = per_head(made, x)
        a = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(6)], dtype=x.dtype)[:, None].expand_as(k)
        return written(made, running(made, a, q, k, v), x)

    check(made, mixed, randn(2, 11, 48))


def test_gla_decays_every_key_channel_by_its_own() -> None:
    made = mixer("gla", rank=4, chunk=4)

    def mixed(x: Tensor) -> Tensor:
        a = torch.sigmoid(made.decay(x)).view(2, 11, 6, 8) ** (1 / 16)
        return written(made, running(made, a, *per_head(made, x)), x)

    check(made, mixed, randn(2, 11, 48))


def test_the_keys_of_metala_are_what_its_decays_give_up() -> None:
    made = mixer("metala", chunk=4)

    def mixed(x: Tensor) -> Tensor:
        x = F.conv1d(F.pad(x.mT, (3, 0)), made.conv.weight[:, None], groups=48).mT
        context = Context.of(x, None, None)
        q, v = made.project("q", x, context), made.project("v", x, context)
        a = torch.sigmoid(made.decay(x)).view(2, 11, 6, 8) ** (1 / 16)
        o = running(made, a, q, 1 - a, v)
        o = o + torch.sigmoid((q * (1 - a) * made.augment).sum(-1, keepdim=True) * v)
        return written(made, o, x, centre=True)

    check(made, mixed, randn(2, 11, 48))


def test_the_keys_of_hgrn2_are_what_its_forget_gates_give_up() -> None:
    made = mixer("hgrn2", lower_bound=0.3, chunk=4)

    def mixed(x: Tensor) -> Tensor:
        context = Context.of(x, None, None)
        q, v = made.project("q", x, context), made.project("v", x, context)
        bound = torch.sigmoid(made.bound)
        f = (bound + (1 - bound) * torch.sigmoid(made.forget(x))).view(2, 11, 6, 8)
        return written(made, running(made, f, F.silu(q), 1 - f, v), x)

    check(made, mixed, randn(2, 11, 48))


def test_the_weights_of_rebased_are_squares() -> None:
    made = mixer("rebased", feature_dim=6, chunk=4)

    def mixed(x: Tensor) -> Tensor:
        q = made.q_affine(made.q_proj(x).unflatten(-1, (6, 6)))
        k = made.k_affine(made.k_proj(x).unflatten(-1, (3, 6))).repeat_interleave(2, 2)
        v = made.project("v", x, Context.of(x, None, None)).repeat_interleave(2, 2)
        weights = (torch.einsum("bthk,bshk->bhts", q, k).square() / 6).tril()
        weights = weights / (weights.sum(-1, keepdim=True) + made.eps)
        return made.projections.out(torch.einsum("bhts,bshv->bthv", weights, v))

    check(made, mixed, randn(2, 11, 48))


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (
            "linear",
            {"feature_map": "cosine"},
            "mixer.feature_map='cosine': choose one of elu1, relu, identity, dpfp, hedgehog",
        ),
        ("linear", {"feature_map": "identity"}, "mixer.normalize=true needs weights that are not negative"),
        ("linear", {"speed": 1}, "cannot be made with .*speed"),
        ("hgrn2", {"lower_bound": 1.0}, r"mixer.lower_bound must be in \(0, 1\)"),
        ("hgrn2", {"lower_bound": 0.9, "memory": 5.0}, "mixer.memory=5.0 tokens ask for a forget gate of 0.819"),
    ],
)
def test_an_impossible_mixer_is_refused(kind: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer(kind, **kwargs)

"""Laws of mixers, for every mixer in conf/mixer inside every family."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import iskd
from iskd import surgery
from iskd.arch import Stack, weight_of
from iskd.export import write
from iskd.hosting import HostedMixer, StateLayer, kept
from iskd.mixers.base import Projections, recurrence
from iskd.mixers.linear_attention import LinearAttention
from iskd.optim import OptimSpec, make_optimizer, new_parameters, regroup
from iskd.plan import Convert, Record, Remove, Replace, Spec, Stage
from iskd.schedules.base import ConvertTo, History
from iskd.schedules.oneshot import Oneshot
from tests.factories import FAMILIES, conf_group, mixer_specs, tiny, windows

SPECS = mixer_specs()
LINEAR = "iskd.mixers.linear_attention.LinearAttention"
LAYERS = (0, 2)
EVERY = [pytest.param(family, name, id=f"{family}-{name}") for family in FAMILIES for name in SPECS]


def converted(family: str, spec: Spec, layers: tuple[int, ...] = LAYERS, **config: Any) -> PreTrainedModel:
    model = tiny(family, **config)
    surgery.apply(model, Record(4), [Convert(layer, spec, seed=layer) for layer in layers])
    return louder(model)


@torch.no_grad()
def louder(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights and no zero biases, so that what a mixer does shows in the logits of a random model."""
    generator = torch.Generator().manual_seed(1)
    for block in Stack(model).layers:
        for parameter in block.get_submodule(Stack(model).family.attn).parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def student(family: str, name: str) -> PreTrainedModel:
    """Shared by the tests below, which must not change it."""
    return converted(family, SPECS[name])


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(input_ids=ids, **kwargs).logits


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def padded(lengths: tuple[int, ...] = (16, 9)) -> tuple[Tensor, Tensor, Tensor]:
    """Windows padded on the left: ids, mask and positions, each [B, T]."""
    ids = windows(len(lengths), max(lengths), seed=3)
    mask = torch.stack([(torch.arange(ids.shape[1]) >= ids.shape[1] - length).long() for length in lengths])
    return ids * mask, mask, (mask.cumsum(1) - 1).clamp_min(0)


def mixers(model: PreTrainedModel, layers: tuple[int, ...] = LAYERS) -> list[nn.Module]:
    stack = Stack(model)
    return [stack.layers[layer].get_submodule(stack.family.attn) for layer in layers]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the recurrence --------------------------------------------------------------------------------------------------


def one_by_one(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Token after token, head after head; key-value heads repeated as the hosts do it."""
    heads = q.shape[2] * q.shape[3]
    q, repeats = q.flatten(2, 3), q.shape[3]
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    states = state.repeat_interleave(repeats, dim=1)
    outputs = []
    for t in range(q.shape[1]):
        states = states + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.stack([torch.einsum("bk,bkv->bv", q[:, t, h], states[:, h]) for h in range(heads)], 1))
    o = torch.stack(outputs, 1).unflatten(2, (-1, repeats))
    return o, states[:, ::repeats]


@pytest.mark.parametrize(("tokens", "chunk"), [(13, 4), (12, 4), (1, 64), (7, 64), (5, 1)])
def test_chunks_give_what_single_tokens_give(tokens: int, chunk: int) -> None:
    inputs = [randn(2, tokens, 3, 2, 4, seed=0), randn(2, tokens, 3, 4, seed=1), randn(2, tokens, 3, 5, seed=2)]
    inputs = [x.requires_grad_() for x in (*inputs, randn(2, 3, 4, 5, seed=3))]
    results = [recurrence(*inputs, chunk=chunk), one_by_one(*inputs)]
    toward = randn(2, tokens, 3, 2, 5, seed=4), randn(2, 3, 4, 5, seed=5)
    gradients = [torch.autograd.grad((o * toward[0]).sum() + (state * toward[1]).sum(), inputs) for o, state in results]
    for fast, slow in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-10)


def test_a_state_carries_the_past() -> None:
    q, k, v = randn(2, 11, 3, 2, 4, seed=0), randn(2, 11, 3, 4, seed=1), randn(2, 11, 3, 5, seed=2)
    whole, end = recurrence(q, k, v, chunk=4)
    state, parts = None, []
    for part in (slice(0, 6), slice(6, 7), slice(7, 11)):
        o, state = recurrence(q[:, part], k[:, part], v[:, part], state, chunk=4)
        parts.append(o)
    assert state is not None
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state, end, atol=1e-10, rtol=1e-10)


def attend(mixer: LinearAttention, x_BTD: Tensor) -> Tensor:
    """Linear attention as a full matrix of weights phi(q)_t phi(k)_s, s <= t, per query head."""
    phi = {"elu1": lambda x: nn.functional.elu(x) + 1, "relu": torch.relu, "identity": lambda x: x}[mixer.feature_map]
    q, k, v = mixer.projections.split(x_BTD)
    repeats = q.shape[3]
    q, k, v = phi(q).flatten(2, 3), phi(k).repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    weights = torch.einsum("bthk,bshk->bhts", q, k) * torch.ones(x_BTD.shape[1], x_BTD.shape[1]).tril()
    scale = weights.sum(-1, keepdim=True) + mixer.eps if mixer.normalize else k.shape[-1] ** 0.5
    o = torch.einsum("bhts,bshv->bthv", weights / scale, v)
    return mixer.projections.o_proj(o.flatten(2))


@pytest.mark.parametrize(
    ("feature_map", "normalize"),
    [("elu1", True), ("elu1", False), ("relu", True), ("relu", False), ("identity", False)],
)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_linear_attention_is_the_matrix_of_its_weights(family: str, feature_map: str, normalize: bool) -> None:
    spec = Spec(LINEAR, {"feature_map": feature_map, "normalize": normalize, "chunk": 4})
    mixer = copy.deepcopy(mixers(converted(family, spec))[0].get_submodule("mixer")).double()
    assert isinstance(mixer, LinearAttention)
    x = randn(2, 11, 48, seed=0).requires_grad_()
    wanted = [x, *mixer.parameters()]
    values = [mixer(x), attend(mixer, x)]
    gradients = [torch.autograd.grad((y * randn(2, 11, 48, seed=1)).sum(), wanted) for y in values]
    for fast, slow in zip((values[0], *gradients[0]), (values[1], *gradients[1]), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-10)


# ---- what is inherited -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_projections_are_those_of_the_attention_in_every_family() -> None:
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    for family in FAMILIES:
        model = louder(tiny(family))
        stack = Stack(model)
        block = stack.layers[1]
        attention = block.get_submodule(stack.family.attn)
        copied = Projections.from_attention(attention, stack)
        projected, dims = [block.get_submodule(path)(x) for path in stack.family.qkv], stack.dims
        # the way in which each family's own attention takes a fused projection apart
        if stack.family.fused == "thirds":
            projected = list(projected[0].split(48, dim=2))
        elif stack.family.fused == "heads":
            projected = [part.flatten(2) for part in projected[0].view(2, 5, dims.heads, -1).chunk(3, dim=-1)]
        for mine, hosts in zip((copied.q_proj, copied.k_proj, copied.v_proj), projected, strict=True):
            same(mine(x), hosts)
        out = block.get_submodule(stack.family.out)
        mixed = torch.randn(2, 5, weight_of(out).shape[1], generator=torch.Generator().manual_seed(1))
        same(copied.o_proj(mixed), out(mixed))
        assert copied.kv_heads == dims.kv_heads
        shared = {p.data_ptr() for p in attention.parameters()} & {p.data_ptr() for p in copied.parameters()}
        assert not shared, "copies: training the student must not move its teacher"


@pytest.mark.parametrize(("family", "config"), [("qwen3", {}), ("phi", {"qk_layernorm": True})])
def test_query_and_key_norms_are_inherited(family: str, config: dict[str, Any]) -> None:
    model = tiny(family, **config)
    stack = Stack(model)
    old = [stack.layers[0].get_submodule(path).state_dict() for path in stack.family.qk_norms]
    surgery.apply(model, Record(4), [Convert(0, Spec(LINEAR))])
    projections = mixers(model)[0].get_submodule("mixer.projections")
    new = [projections.get_submodule(path).state_dict() for path in ("q_norm", "k_norm")]
    for mine, hosts in zip(new, old, strict=True):
        assert mine.keys() == hosts.keys()
        assert all(torch.equal(mine[key], hosts[key]) for key in hosts)


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_all_but_the_mixer_stays_the_same_objects(family: str, name: str) -> None:
    model = tiny(family)
    stack = Stack(model)
    before = {key: (p, p.detach().clone()) for key, p in model.named_parameters()}
    blocks, config = list(stack.layers), copy.deepcopy(model.config.to_dict())
    record = surgery.apply(model, Record(4), [Convert(layer, SPECS[name]) for layer in LAYERS])
    assert record.layers == (0, 1, 2, 3)
    assert model.config.to_dict() == config
    inside = tuple(f".{stack.family.layers}.{layer}.{stack.family.attn}." for layer in LAYERS)
    after = dict(model.named_parameters())
    for key, (p, value) in before.items():
        if not any(part in key for part in inside):
            assert after[key] is p
            assert torch.equal(p, value)
    assert all(any(part in key for part in inside) for key in after.keys() - before.keys())
    fresh = {id(p) for mixer in mixers(model) for p in mixer.parameters()}
    assert not fresh & {id(p) for p, _ in before.values()}
    assert type(stack.layers[0]) is type(blocks[0])
    assert not isinstance(blocks[0].get_submodule(stack.family.attn), HostedMixer), "the old block stays as it was"
    assert [mixer.layer_idx for mixer in mixers(model)] == list(LAYERS)


# ---- inside a host ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_the_future_does_not_change_the_past(family: str, name: str) -> None:
    model, ids = student(family, name), windows()
    whole = logits(model, ids)
    for seen in (1, 6, 15):
        changed = logits(model, torch.cat([ids[:, :seen], windows(2, 16 - seen, seed=9)], dim=1))
        same(changed[:, :seen], whole[:, :seen])
        assert not torch.allclose(changed[:, seen:], whole[:, seen:])


@pytest.mark.parametrize(("family", "name"), EVERY)
@torch.no_grad()
def test_a_mixer_mixes(family: str, name: str) -> None:
    """The last output depends on the first token through the mixer alone."""
    mixer = mixers(student(family, name))[0]
    x = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(0))
    other = torch.cat([-x[:, :1], x[:, 1:]], dim=1)
    assert (mixer(x)[0][:, -1] - mixer(other)[0][:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "name"), EVERY)
def test_padding_does_not_enter_the_state(family: str, name: str, implementation: str) -> None:
    model = student(family, name)
    if implementation == "eager":
        weights = model.state_dict()
        model = converted(family, SPECS[name], attn_implementation="eager")
        model.load_state_dict(weights)
    ids, mask, positions = padded()
    batch = logits(model, ids, attention_mask=mask, position_ids=positions)
    same(batch[:1], logits(student(family, name), ids[:1]))
    same(batch[1:, -9:], logits(student(family, name), ids[1:, -9:]))
    right = torch.arange(16).expand(2, 16) < torch.tensor([[16], [9]])
    same(
        logits(model, windows(), attention_mask=right.long())[1:, :9],
        logits(student(family, name), windows()[1:, :9]),
    )
    same(logits(model, ids, attention_mask=torch.ones_like(ids)), logits(model, ids))


@torch.no_grad()
def check_cache(model: PreTrainedModel) -> None:
    """Reading a window in parts, each with the cache of those before, gives what reading it at once gives."""
    ids = windows()
    whole, parts, past = logits(model, ids), [], None
    for part in ids.split((6, 1, 9), dim=1):
        output = model(part, past_key_values=past, use_cache=True)
        past = output.past_key_values
        parts.append(output.logits)
    assert past is not None
    assert past.get_seq_length() == 16
    same(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_a_cache_changes_nothing(family: str, name: str) -> None:
    check_cache(student(family, name))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("opt", {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
        ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
        ("phi", {"qk_layernorm": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
        ("llama", {"kv_heads": 1}),
        ("llama", {"kv_heads": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("mistral", {"sliding_window": 5}),
    ],
)
def test_variants_of_a_family_host_every_mixer(family: str, config: dict[str, Any], name: str) -> None:
    for layers in (LAYERS, (0, 1, 2, 3), (3,)):
        model = converted(family, SPECS[name], layers, **config)
        check_cache(model)
        check_generation(model, (9, 7))


def generate(model: Any, *, cached: bool, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    return model.generate(
        ids, attention_mask=mask, use_cache=cached, return_dict_in_generate=True, output_scores=True, **options
    )


def check_generation(model: PreTrainedModel, lengths: tuple[int, ...], **options: Any) -> None:
    """Greedy text and scores of a left-padded batch: with a cache, without, and of each sequence alone."""
    ids, mask, _ = padded(lengths)
    with_cache, without = (generate(model, cached=cached, ids=ids, mask=mask, **options) for cached in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for a, b in zip(with_cache.scores, without.scores, strict=True):
        same(a, b)
    for row, length in enumerate(lengths):
        one = ids[row : row + 1, -length:]
        alone = generate(model, cached=True, ids=one, mask=torch.ones_like(one), **options)
        assert torch.equal(alone.sequences[0, length:], with_cache.sequences[row, ids.shape[1] :])


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_generation_with_a_cache_is_generation_without(family: str, name: str) -> None:
    check_generation(student(family, name), (6, 3))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_beams_carry_the_state_with_them(family: str, name: str) -> None:
    ids, mask, _ = padded((6, 3))
    model = student(family, name)
    one, other = (generate(model, cached=cached, ids=ids, mask=mask, num_beams=3) for cached in (True, False))
    assert torch.equal(one.sequences, other.sequences)
    same(one.sequences_scores, other.sequences_scores)


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_the_state_does_not_grow(name: str) -> None:
    model = converted("llama", SPECS[name], (0, 1, 2, 3))
    sizes = []
    for tokens in (3, 16):
        past = model(windows(2, tokens), use_cache=True).past_key_values
        assert all(isinstance(layer, StateLayer) for layer in past.layers)
        assert past.get_seq_length() == tokens
        sizes.append([part.shape for layer in past.layers for part in layer.state])
        assert all(part.dtype == torch.float32 for layer in past.layers for part in layer.state)
    assert sizes[0] == sizes[1]


@torch.no_grad()
def test_a_cache_that_cannot_hold_a_state_is_refused() -> None:
    model = student("llama", "linear_attention")
    ids = windows()
    foreign = tiny("llama")(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="slot 0 of the cache is a DynamicLayer"):
        model(ids, past_key_values=foreign)
    with pytest.raises(ValueError, match="cache_implementation='dynamic'"):
        generate(model, cached=True, ids=ids, mask=torch.ones_like(ids), cache_implementation="static")
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot take 4 tokens out of the state"):
        past.crop(-4)
    past.reset()
    same(model(ids, past_key_values=past).logits, logits(model, ids))
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([0, 2]))
    same(model(ids[:, :3], past_key_values=past).logits, logits(model, torch.cat([ids, ids[:, :3]], 1))[:, 16:])


def test_which_tokens_are_kept_is_read_off_every_kind_of_mask() -> None:
    real = torch.tensor([[True, True, True], [False, True, True]])
    sees = real[:, None, None, :] & torch.ones(3, 3, dtype=torch.bool).tril()
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~sees, torch.finfo(torch.float32).min)
    assert kept(None, 3) is None
    for mask in (sees, additive, real.long(), torch.cat([torch.ones(2, 2), real.float()], 1)):
        found = kept(mask, 3)
        assert found is not None
        assert torch.equal(found, real)
    with pytest.raises(ValueError, match="cannot read the attention mask BlockMask"):
        kept(type("BlockMask", (), {})(), 3)
    with pytest.raises(ValueError, match=r"cannot read the attention mask \[3\]"):
        kept(torch.ones(3), 3)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_every_parameter_learns(family: str, name: str) -> None:
    model, ids = converted(family, SPECS[name]), windows(4, 16)
    model(ids, labels=ids).loss.backward()
    for mixer in mixers(model):
        still = [key for key, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not still


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_half_precision_stays_finite(family: str, name: str) -> None:
    model, ids = converted(family, SPECS[name]), windows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for mixer in mixers(model) for p in mixer.parameters())
    assert (output.logits.float() - logits(model, ids)).abs().max() < 0.2
    half = copy.deepcopy(model).bfloat16()
    assert logits(half, ids).dtype == torch.bfloat16
    assert logits(half, ids).isfinite().all()


def test_only_the_mixer_of_a_converted_block_is_new() -> None:
    slim = Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})
    mixer, model = Spec(LINEAR), tiny("gpt2")
    stage = Stage("one", (Convert(0, mixer), Replace(1, slim), Convert(1, mixer), Convert(2, mixer), Remove(2)))
    record, blocks = surgery.apply(model, Record(4), stage.edits), Stack(model).layers
    expected = [*mixers(model, (0,))[0].parameters(), *blocks[1].parameters()]
    assert {id(p) for p in new_parameters(model, record, stage)} == {id(p) for p in expected}
    optimizer = make_optimizer(OptimSpec())
    regroup(optimizer, model, record, stage)
    groups = {group["name"]: set[int]() for group in optimizer.param_groups}
    for group in optimizer.param_groups:
        groups[group["name"]] |= {id(p) for p in group["params"]}
    assert groups["new"] == {id(p) for p in expected}
    assert groups["base"] == {id(p) for p in model.parameters()} - groups["new"]


def test_a_schedule_converts_layers() -> None:
    edit = ConvertTo(Spec(LINEAR, {"chunk": 8}))
    stage = Oneshot(edit, count=-1, order="alternate", protect=[3], tokens=100, seed=2).next_stage(History(Record(4)))
    assert stage is not None
    assert not stage.fit
    assert sorted(stage.edits, key=lambda e: e.layer) == [Convert(i, edit.mixer, seed=20_014 + i) for i in range(3)]
    with pytest.raises(ValueError, match="mixers have no fit"):
        ConvertTo(edit.mixer, fit=True)


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_a_record_rebuilds_the_same_structure(family: str, name: str) -> None:
    teacher = tiny(family)
    slim = Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})
    edits = [Convert(0, SPECS[name], seed=3), Remove(1), Replace(3, slim), Convert(3, SPECS[name])]
    at_once, one_by_one_ = copy.deepcopy(teacher), copy.deepcopy(teacher)
    record, stepwise = surgery.apply(at_once, Record(4), edits), Record(4)
    for edit in edits:
        stepwise = surgery.apply(one_by_one_, stepwise, [edit])
    assert record == stepwise
    shapes = {key: value.shape for key, value in at_once.state_dict().items()}
    assert all(torch.equal(value, at_once.state_dict()[key]) for key, value in one_by_one_.state_dict().items())
    rebuilt = surgery.rebuild(teacher, record)
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == shapes
    rebuilt.load_state_dict(at_once.state_dict())
    assert torch.equal(logits(rebuilt.eval(), windows()), logits(at_once, windows()))
    meta = surgery.rebuild(teacher, record, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {key: value.shape for key, value in meta.state_dict().items()} == shapes
    check_cache(at_once)


@pytest.mark.parametrize("name", SPECS)
def test_a_converted_student_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    teacher, model = tiny("qwen3"), tiny("qwen3")
    record = surgery.apply(model, Record(4), [Convert(0, SPECS[name]), Remove(2), Convert(3, SPECS[name])])
    write(tmp_path, model, record, teacher.config)
    loaded = iskd.load(tmp_path)
    assert torch.equal(logits(loaded, windows()), logits(model, windows()))
    ids, mask, _ = padded((6, 3))
    texts = [generate(m, cached=True, ids=ids, mask=mask).sequences for m in (loaded, model)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", SPECS)
def test_a_yaml_names_what_its_mixer_takes(name: str) -> None:
    target = conf_group("mixer")[name]
    takes = inspect.signature(Spec(target["_target_"]).resolve().from_attention).parameters  # type: ignore[attr-defined]
    assert set(target) - {"_target_", "defaults"} <= set(takes)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"feature_map": "cosine"}, "mixer.feature_map='cosine': choose one of elu1, relu, identity"),
        ({"feature_map": "identity"}, "mixer.normalize=true needs weights that are not negative"),
        ({"chunk": 0}, "mixer.chunk must be at least 1"),
        ({"eps": 0.0}, "mixer.eps positive"),
    ],
)
def test_an_impossible_linear_attention_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        converted("llama", Spec(LINEAR, kwargs))

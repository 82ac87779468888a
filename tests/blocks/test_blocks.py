"""Laws of compact blocks, for every block in conf/block inside every family."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.blocks.bottleneck import Bottleneck
from iskd.models import Stack, surgery
from iskd.models.hosting import HostedBlock
from iskd.plan import Record, Remove, Replace, Spec
from tests.factories import FAMILIES, block_specs, tiny, windows
from tests.laws import check_beams, check_cache, check_generation, check_padding, check_past, logits, same

SPECS = block_specs()
LAYERS = (0, 2)
EVERY = [pytest.param(family, name, id=f"{family}-{name}") for family in FAMILIES for name in SPECS]
BOTTLENECK = "iskd.blocks.bottleneck.Bottleneck"
SLIM = "iskd.blocks.slim.Slim"


def fresh(family: str, spec: Spec, **config: Any) -> PreTrainedModel:
    model = tiny(family, **config)
    surgery.apply(model, Record(4), [Replace(layer, spec, seed=layer) for layer in LAYERS])
    return model


@torch.no_grad()
def awake(model: PreTrainedModel) -> PreTrainedModel:
    """Move all weights of the new blocks, so that a block that starts as the identity has something to show."""
    generator = torch.Generator().manual_seed(1)
    for layer in LAYERS:
        for parameter in Stack(model).layers[layer].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def student(family: str, name: str) -> PreTrainedModel:
    """Shared by the tests below, which must not change it."""
    return awake(fresh(family, SPECS[name]))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_shape_and_dtype_are_kept_and_parameters_saved(family: str, name: str) -> None:
    host, model = tiny(family), student(family, name)
    assert logits(model, windows(3, 7)).shape == (3, 7, 101)
    assert logits(model, windows(1, 1)).isfinite().all()
    half = copy.deepcopy(model).bfloat16()
    result = logits(half, windows())
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()
    for layer in LAYERS:
        new, old = (sum(p.numel() for p in Stack(m).layers[layer].parameters()) for m in (model, host))
        assert new < old


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_the_future_does_not_change_the_past(family: str, name: str) -> None:
    check_past(student(family, name))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "name"), EVERY)
def test_padding_on_the_left_changes_nothing(family: str, name: str, implementation: str) -> None:
    model = student(family, name)
    if implementation == "eager":
        weights = model.state_dict()
        model = fresh(family, SPECS[name], attn_implementation="eager")
        model.load_state_dict(weights)
    check_padding(model, alone=student(family, name))


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
        ("mistral", {"sliding_window": 5}),
    ],
)
def test_variants_of_a_family_host_every_block(family: str, config: dict[str, Any], name: str) -> None:
    model = awake(fresh(family, SPECS[name], **config))
    check_cache(model)
    if config.get("sliding_window"):
        check_generation(model, (9, 7))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_generation_with_a_cache_is_generation_without(family: str, name: str) -> None:
    check_generation(student(family, name))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_every_parameter_learns(family: str, name: str) -> None:
    model, ids = fresh(family, SPECS[name]), windows(4, 16)
    blocks = [Stack(model).layers[layer] for layer in LAYERS]
    names = {f"{i}.{key}": p for i, block in enumerate(blocks) for key, p in block.named_parameters()}
    reached: set[str] = set()
    # a zero up-projection lets nothing through to the weights below it until its first step
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        reached |= {key for key, p in names.items() if p.grad is not None and p.grad.abs().max() > 0}
        with torch.no_grad():
            for p in names.values():
                p.sub_(0.1 * p.grad if p.grad is not None else 0.0)
    assert reached == set(names)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["bottleneck", "linear", "identity"])
def test_a_block_without_inherited_weights_starts_as_removal(family: str, name: str) -> None:
    removed = tiny(family)
    surgery.apply(removed, Record(4), [Remove(layer) for layer in LAYERS])
    assert torch.equal(logits(fresh(family, SPECS[name]), windows()), logits(removed, windows()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_bottleneck_does_not_start_as_removal(family: str) -> None:
    removed = tiny(family)
    surgery.apply(removed, Record(4), [Remove(layer) for layer in LAYERS])
    assert not torch.allclose(logits(fresh(family, SPECS["bottleneck_paper"]), windows()), logits(removed, windows()))


def _rows(model: PreTrainedModel, block: Bottleneck, name: str) -> tuple[nn.Parameter, Any]:
    """Weight of the first inner attention and the index of its query or key rows."""
    family = Stack(model).family
    layer = block.inner.get_submodule(family.layers)[0]  # type: ignore[index]
    place = {"q": 0, "k": 1}[name]
    if not family.fused:
        return layer.get_submodule(family.qkv[place]).weight, slice(None)
    weight = layer.get_submodule(family.qkv[0]).weight
    if family.fused == "thirds":
        third = weight.shape[1] // 3
        return weight, (slice(None), slice(place * third, (place + 1) * third))
    if family.fused == "stacked":
        third = weight.shape[0] // 3  # as many key-value heads as heads
        return weight, slice(place * third, (place + 1) * third)
    width = weight.shape[0] // 3 // block.kv_heads
    rows = torch.arange(weight.shape[0]).view(block.kv_heads, 3, width)[:, place].flatten()
    return weight, rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["q", "k"])
@torch.no_grad()
def test_queries_and_keys_matter_inside_a_bottleneck(family: str, name: str) -> None:
    # the published code wraps the mask twice, which makes attention uniform: queries and keys are dead weights there
    model = copy.deepcopy(student(family, "bottleneck"))
    hosted = Stack(model).layers[0]
    assert isinstance(hosted, HostedBlock)
    assert isinstance(hosted.block, Bottleneck)
    before = logits(model, windows())
    weight, rows = _rows(model, hosted.block, name)
    weight[rows] = torch.randn(weight[rows].shape, generator=torch.Generator().manual_seed(4))
    assert (logits(model, windows()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_bottleneck_called_without_mask_and_positions_is_causal(family: str) -> None:
    block = Stack(student(family, "bottleneck")).layers[0].get_submodule("block")
    h_BTD = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(0))
    hidden = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 12, 12)
    same(block(h_BTD), block(h_BTD, mask=hidden, positions=torch.arange(12).expand(2, 12)))


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_carry_the_inner_cache_with_them(family: str) -> None:
    check_beams(student(family, "bottleneck"))


@pytest.mark.parametrize("name", ["bottleneck", "linear", "identity", "slim"])
@torch.no_grad()
def test_a_cropped_cache_goes_on_where_it_was_cut(name: str) -> None:
    model, ids = student("llama", name), windows()
    past = model(ids, use_cache=True).past_key_values
    past.crop(-6)
    assert past.get_seq_length() == 10
    same(model(ids[:, 10:], past_key_values=past).logits, logits(model, ids)[:, 10:])


@pytest.mark.parametrize(
    ("family", "kwargs", "message"),
    [
        ("gpt2", {"reduction": 5}, "block.reduction=5 does not divide the stream width 48"),
        ("llama", {"reduction": 0}, "block.reduction=0 does not divide"),
        ("gpt2", {"reduction": 3, "heads": 5}, "block.heads=5 does not divide the inner width 16"),
        ("qwen2", {"reduction": 8, "heads": 2}, "block.heads=2 gives heads of width 3; rotary positions need an even"),
        ("llama", {"reduction": 3, "layers": 0}, "block.layers must be between 1 and 64, got 0"),
    ],
)
def test_a_bottleneck_of_impossible_size_is_refused(family: str, kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(family, Spec(BOTTLENECK, kwargs))


def test_a_linear_block_without_ridge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block.ridge must be positive, got 0"):
        fresh("llama", Spec("iskd.blocks.linear.Linear", {"ridge": 0}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("select", ["activation", "l1"])
def test_a_slim_block_that_keeps_everything_is_the_original(family: str, select: str) -> None:
    model, host = fresh(family, Spec(SLIM, {"ratio": 1.0, "select": select})), tiny(family)
    for layer in LAYERS:
        new, old = (Stack(m).layers[layer].state_dict() for m in (model, host))
        assert new.keys() == old.keys()
        assert all(torch.equal(new[key], old[key]) for key in old)
    assert torch.equal(logits(model, windows()), logits(host, windows()))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_units_that_do_nothing_leave_without_a_trace(family: str) -> None:
    host = tiny(family)
    stack = Stack(host)
    width, dead = stack.dims.heads // stack.dims.kv_heads * stack.dims.head_dim, torch.tensor([3, 17, 95])
    for layer in LAYERS:
        out, down = (stack.layers[layer].get_submodule(path) for path in (stack.family.out, stack.family.down))
        for projection, units in ((out, slice(width, 2 * width)), (down, dead)):
            weight = projection.get_parameter("weight")
            (weight if isinstance(projection, nn.Linear) else weight.T)[:, units] = 0.0
        for path in stack.family.ups:
            up = stack.layers[layer].get_submodule(path)
            weight = up.get_parameter("weight")
            for part in range(stack.family.fused_ups):
                (weight if isinstance(up, nn.Linear) else weight.T)[dead + 96 * part] = 0.0
    model = copy.deepcopy(host)
    # a norm over all heads (OLMo 2) would notice that some are missing
    norms = [path for path, _ in stack.layers[0].named_modules() if path in stack.family.qk_norms]  # Phi may lack them
    gone = any(stack.layers[0].get_submodule(path).get_parameter("weight").numel() > width for path in norms)
    spec = Spec(SLIM, {"kv_groups": stack.dims.kv_heads - (not gone), "channels": 93})
    surgery.apply(model, Record(4), [Replace(layer, spec) for layer in LAYERS])
    assert surgery.block_parameters(model) < surgery.block_parameters(host)
    same(logits(model, windows()), logits(host, windows()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.9])
def test_a_ratio_is_the_share_of_parameters_that_is_kept(family: str, ratio: float) -> None:
    model, host = fresh(family, Spec(SLIM, {"ratio": ratio})), tiny(family)
    new, old = (sum(p.numel() for p in Stack(m).layers[0].parameters()) for m in (model, host))
    assert abs(new / old - ratio) < 0.03


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratio": 0}, r"block.ratio must be in \(0, 1\], got 0"),
        ({"ratio": 1.5}, r"block.ratio must be in \(0, 1\], got 1.5"),
        ({"ratio": -0.5}, r"block.ratio must be in \(0, 1\]"),
        ({"kv_groups": 4, "channels": 10}, "block.kv_groups=4: the block has 3 key-value groups"),
        ({"kv_groups": 0, "channels": 10}, "block.kv_groups=0"),
        ({"kv_groups": 2, "channels": 97}, "block.channels=97: the block's MLP has 96 channels"),
        ({"kv_groups": 2, "channels": 0}, "block.channels=0"),
        ({}, "give either block.ratio, or both"),
        ({"ratio": 0.5, "kv_groups": 1, "channels": 9}, "give either block.ratio, or both"),
        ({"kv_groups": 1}, "give either block.ratio, or both"),
        ({"ratio": 0.5, "select": "l2"}, "block.select='l2': choose"),
    ],
)
def test_a_slim_block_of_impossible_size_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh("llama", Spec(SLIM, kwargs))

"""Laws of the one file that knows transformers: what it says about a family is what the family's models do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, DynamicCache, StaticCache

from iskd.blocks.identity import Identity
from iskd.blocks.small_decoder import run_decoder, small_decoder
from iskd.models import surgery
from iskd.models.cache import CacheSlot
from iskd.models.capture import capture
from iskd.models.families import FAMILIES, Dims, dims_of, family_of
from iskd.models.head import cap_logits
from iskd.models.hosting import HostedBlock
from iskd.models.stack import Stack, set_layer_idx
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec
from tests import factories
from tests.factories import tiny, windows


def test_every_family_is_tested() -> None:
    assert set(FAMILIES) == set(factories.FAMILIES)


def test_other_families_are_refused_with_the_supported_ones() -> None:
    with pytest.raises(ValueError, match=r"model_type 't5' has no descriptor.*supported are gemma, gemma2"):
        family_of(AutoConfig.for_model("t5"))


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_and_paths_are_those_of_the_model(name: str) -> None:
    stack = Stack(tiny(name))
    family, dims = stack.family, stack.dims
    assert len(stack.layers) == 4
    assert dims.hidden == 48
    assert dims.mlp == 96
    assert stack.context == 64
    block = stack.layers[0]
    shapes = [tuple(block.get_submodule(path).get_parameter("weight").shape) for path in family.qkv]
    queries, keys = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    if family.fused:
        assert {frozenset(shape) for shape in shapes} == {frozenset((48, queries + 2 * keys))}
    else:
        assert shapes == [(queries, 48), (keys, 48), (keys, 48)]
    assert {queries, 48} == set(block.get_submodule(family.out).get_parameter("weight").shape)
    for path, count in (*((path, family.fused_ups) for path in family.ups), (family.down, 1)):
        assert {count * 96, 48} == set(block.get_submodule(path).get_parameter("weight").shape)
    for path in family.post_norms:
        assert isinstance(block.get_submodule(path), nn.Module)
    assert block.get_submodule(family.attn).layer_idx == 0
    for path in (family.embed, family.norm, family.rotary, family.positions, family.dropout):
        assert path is None or isinstance(stack.base.get_submodule(path), nn.Module)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_limit_is_that_of_what_is_left_of_the_teacher(name: str) -> None:
    """A model reads to its context; with its last attention that ends, but a table of learned positions does not."""
    stack, mixer = Stack(tiny(name)), Spec("iskd.mixers.linear_attention.LinearAttention", {})
    assert stack.limit == 64
    slim: list[Edit] = [Replace(3, Spec("iskd.blocks.slim.Slim", {"ratio": 0.6}))]
    record = surgery.apply(stack.model, Record(4), [*slim, *(Convert(layer, mixer) for layer in range(3))])
    assert stack.limit == 64, "an attention inside a compact block is left"
    surgery.apply(stack.model, record, [Remove(3)])
    if stack.family.positions is None:
        assert (stack.limit, stack.bound) == (None, "")
        assert stack.last_hidden(windows(1, 80)).shape[1] == 80
    else:
        assert (stack.limit, stack.bound) == (64, "the table of 64 learned positions")
        with pytest.raises(ValueError, match="a text of 65 tokens is longer than the table of 64 learned positions"):
            stack.last_hidden(windows(1, 65))


def test_sizes_that_a_config_leaves_out_follow_its_family() -> None:
    gpt2 = AutoConfig.for_model("gpt2", n_embd=48, n_head=6)
    assert dims_of(gpt2) == Dims(hidden=48, heads=6, kv_heads=6, head_dim=8, mlp=192)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_finishing_the_last_state_gives_the_logits(name: str) -> None:
    stack, ids = Stack(tiny(name)), windows()
    with capture(stack, range(4), {3}) as states:
        logits = stack.model(ids).logits
    weight, bias = stack.head
    found = nn.functional.linear(stack.final_norm(states[3]), weight, bias)
    assert torch.equal(cap_logits(found, scale=1.0, softcap=stack.softcap), logits)
    assert torch.equal(stack.final_norm(states[3]), stack.last_hidden(ids))
    assert stack.softcap == {"gemma2": 30.0}.get(name)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_small_decoder_runs_as_its_own_model_would(name: str) -> None:
    stack = Stack(tiny(name))
    dims = Dims(hidden=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
    torch.manual_seed(0)
    inner = small_decoder(stack.config, type(stack.base), dims, 3).eval()
    x_BTD = torch.randn(2, 12, 16)
    ours = run_decoder(inner, stack.family, x_BTD, None, None, None)
    reference = inner(inputs_embeds=x_BTD, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    assert stack.config.hidden_size == 48
    assert not hasattr(inner, stack.family.embed)


def test_a_slot_is_set_on_every_module_that_has_one_but_not_inside_a_hosted_block() -> None:
    stack = Stack(tiny("llama"))
    set_layer_idx(stack.layers[0], 3)
    assert stack.layers[0].get_submodule("self_attn").layer_idx == 3
    inner = small_decoder(stack.config, type(stack.base), Dims(16, 2, 2, 8, 32), 2)
    hosted = HostedBlock(inner, stack.family)
    set_layer_idx(hosted, 5)
    assert hosted.layer_idx == 5
    assert [inner.get_submodule(f"layers.{i}.self_attn").layer_idx for i in range(2)] == [0, 1]


def test_a_slot_counts_tokens_and_refuses_caches_of_fixed_length() -> None:
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    slot = CacheSlot(cache, 1)
    assert slot.past() is None
    slot.mark(torch.zeros(2, 5, 48))
    slot.append(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1))
    past = slot.past()
    assert past is not None
    assert past[0].shape == (2, 1, 6, 1)
    assert cache.get_seq_length(1) == 6
    static = StaticCache(config=model.config, max_cache_len=8)
    static.update(torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8), 0)
    with pytest.raises(ValueError, match="compact blocks need a growing cache"):
        CacheSlot(static, 0).past()


def test_a_hosted_block_gets_what_its_host_passes_by_position() -> None:
    seen = {}

    class Seeing(Identity):
        def forward(self, h_BTD: torch.Tensor, **kwargs: object) -> torch.Tensor:
            seen.update(kwargs)
            return h_BTD

    hosted = HostedBlock(Seeing(), FAMILIES["gpt2"])
    mask, positions, cache = torch.ones(1), torch.arange(2), DynamicCache()
    hosted(torch.zeros(1, 2, 4), cache, mask, None, position_ids=positions)
    assert seen["mask"] is mask
    assert seen["positions"] is positions
    assert isinstance(seen["cache"], CacheSlot)
    hosted(torch.zeros(1, 2, 4), None, None)
    assert seen == {"mask": None, "positions": None, "cache": None}

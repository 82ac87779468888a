"""What a conversion changes in its host, which cache and mask it takes, what trains, and who converts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.models import surgery
from iskd.models.hosting import HostedMixer, kept
from iskd.models.stack import Stack
from iskd.plan import Convert, Record, Remove, Replace, Spec, Stage
from iskd.schedules import History, next_stage
from iskd.schedules.edits import ConvertTo
from iskd.schedules.oneshot import Oneshot
from iskd.training.step import OptimSpec, make_optimizer, regroup
from iskd.training.step.trainable import new_parameters
from tests.factories import FAMILIES, mixer_specs, tiny, windows

LINEAR = "iskd.mixers.linear_attention.LinearAttention"


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in ("linear_attention", "gla")]
)
def test_all_but_the_mixer_stays_the_same_objects(family: str, name: str) -> None:
    model = tiny(family)
    stack = Stack(model)
    before = {key: (p, p.detach().clone()) for key, p in model.named_parameters()}
    blocks, config = list(stack.layers), copy.deepcopy(model.config.to_dict())
    record = surgery.apply(model, Record(4), [Convert(layer, mixer_specs()[name]) for layer in (0, 2)])
    assert record.layers == (0, 1, 2, 3)
    assert model.config.to_dict() == config
    inside = tuple(f".{stack.family.layers}.{layer}.{stack.family.attn}." for layer in (0, 2))
    after = dict(model.named_parameters())
    for key, (p, value) in before.items():
        if not any(word in key for word in inside):
            assert after[key] is p
            assert torch.equal(p, value)
    assert all(any(word in key for word in inside) for key in after.keys() - before.keys())
    new: list[Any] = [stack.layers[layer].get_submodule(stack.family.attn) for layer in (0, 2)]
    fresh = {id(p) for mixer in new for p in mixer.parameters()}
    assert not fresh & {id(p) for p, _ in before.values()}
    assert type(stack.layers[0]) is type(blocks[0])
    assert not isinstance(blocks[0].get_submodule(stack.family.attn), HostedMixer), "the old block stays as it was"
    assert [mixer.layer_idx for mixer in new] == [0, 2]


@torch.no_grad()
def test_a_cache_that_cannot_hold_a_state_is_refused() -> None:
    model: Any = tiny("llama")
    surgery.apply(model, Record(4), [Convert(layer, Spec(LINEAR)) for layer in (0, 2)])
    ids = windows()
    foreign = tiny("llama")(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="slot 0 of the cache is a DynamicLayer"):
        model(ids, past_key_values=foreign)
    with pytest.raises(ValueError, match="cache_implementation='dynamic'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
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


def test_only_the_mixer_of_a_converted_block_is_new() -> None:
    slim = Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})
    mixer, model = Spec(LINEAR), tiny("gpt2")
    stage = Stage("one", (Convert(0, mixer), Replace(1, slim), Convert(1, mixer), Convert(2, mixer), Remove(2)))
    record, blocks = surgery.apply(model, Record(4), stage.edits), Stack(model).layers
    expected = [*blocks[0].get_submodule(Stack(model).family.attn).parameters(), *blocks[1].parameters()]
    assert {id(p) for p in new_parameters(model, record, stage)} == {id(p) for p in expected}
    optimizer = make_optimizer(OptimSpec())
    regroup(optimizer, model, record, stage, {})
    groups = {group["name"]: set[int]() for group in optimizer.param_groups}
    for group in optimizer.param_groups:
        groups[group["name"]] |= {id(p) for p in group["params"]}
    assert groups["new"] == {id(p) for p in expected}
    assert groups["base"] == {id(p) for p in model.parameters()} - groups["new"]


def test_a_schedule_converts_layers() -> None:
    edit = ConvertTo(Spec(LINEAR, {"chunk": 8}))
    schedule = Oneshot(edit, count=-1, order="alternate", protect=[3], tokens=100, seed=2)
    stage = next_stage(schedule, History(Record(4)))
    assert stage is not None
    assert not stage.fit
    assert sorted(stage.edits, key=lambda e: e.layer) == [Convert(i, edit.mixer, seed=20_014 + i) for i in range(3)]
    with pytest.raises(ValueError, match="mixers have no fit"):
        ConvertTo(edit.mixer, fit=True)


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3)])
def test_a_state_goes_on_past_the_context_of_the_teacher(layers: tuple[int, ...]) -> None:
    model = tiny("llama", context=8)
    surgery.apply(model, Record(4), [Convert(layer, mixer_specs()["gla"]) for layer in layers])
    ids = windows(1, 8)
    with_cache, without = (
        model.generate(ids, min_new_tokens=16, max_new_tokens=16, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert with_cache.shape == (1, 24)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_end_where_the_teachers_do(family: str) -> None:
    model = tiny(family, context=8)
    surgery.apply(model, Record(4), [Convert(layer, mixer_specs()["gla"]) for layer in range(4)])
    assert logits(model, windows(1, 8)).isfinite().all()
    with pytest.raises((IndexError, ValueError)):
        logits(model, windows(1, 16))

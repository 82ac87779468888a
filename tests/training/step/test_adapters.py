"""Healing with adapters: attaching and merging change no output, only adapters train, nothing is left of them."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from iskd.models import Stack, surgery
from iskd.models.projections import weight_of
from iskd.models.weights import model_tensors
from iskd.plan import Convert, Record, Remove, Replace, Spec, Stage, to_json
from iskd.plan.reading import stage_from_json
from iskd.plan.stage import LoraSpec, lora_of
from iskd.schedules.edits import RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.schedules.none import NoEdits
from iskd.training.editing import adapt
from iskd.training.movement import MovementCheck
from iskd.training.step import adapters
from iskd.training.step.optimizer import OptimSpec, make_optimizer
from iskd.training.step.trainable import check_partition, regroup, watched_parameters
from iskd.training.strategies import FSDP2Strategy, check_strategy
from tests.factories import digest, hooks, tiny, windows
from tests.runs import (
    MIXER,
    SLIM,
)

RECORD = Record(4)
SPEC = LoraSpec(rank=3, alpha=6)
HEAL = Stage("heal", train="lora", tokens=64, lr=1e-2, lora=SPEC)


def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(windows(), **inputs).logits


def drawn(model: nn.Module) -> None:
    """Make every B what it could be after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.adapters(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def backward(model: PreTrainedModel, **inputs: Any) -> None:
    model.zero_grad()
    model(windows(), labels=windows(), **inputs).loss.backward()


@pytest.mark.parametrize("family", ["gpt2", "phi", "llama", "qwen3", "gpt_neox", "opt"])
def test_attaching_changes_no_output_and_merging_gives_the_adapted_model(family: str) -> None:
    """Linear maps and GPT-2's transposed ones; the merged weights are the same parameters as before."""
    model = tiny(family)
    plain, before, parameters = logits(model), digest(model), list(model.parameters())
    adapters.attach(model, RECORD, SPEC)
    assert torch.equal(logits(model), plain)
    assert len(adapters.adapters(model)) == 2 * sum(len(adapters._maps(b, "", "mlp")) for b in Stack(model).layers) > 0
    drawn(model)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 1e-3
    assert torch.equal(logits(copy.deepcopy(model)), adapted), "a copy has adapters of its own"
    assert adapters.merge(model)
    assert (logits(model) - adapted).abs().max() < 1e-5
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert model_tensors(model).keys() == model_tensors(tiny(family)).keys()
    assert hooks(model) == 0
    assert not adapters.merge(model), "nothing left to merge"
    adapters.attach(model, RECORD, SPEC)
    adapters.merge(model)
    assert digest(model) != before
    assert (logits(model) - adapted).abs().max() < 1e-5


def test_merging_adds_the_formula_of_the_paper() -> None:
    """W + alpha / rank * B A, also where rank is more than the map can have."""
    for rank in (2, 1000):
        model = tiny("gpt2")
        adapters.attach(model, RECORD, LoraSpec(rank=rank, alpha=5.0))
        drawn(model)
        module, adapter = adapters._attached(model)[0]
        assert adapter.a.shape == (min(rank, 48), 48)
        wanted = weight_of(module).detach().double() + 5.0 / rank * adapter.b.double() @ adapter.a.double()
        adapters.merge(model)
        assert (weight_of(module) - wanted).abs().max() < 1e-6


def test_fresh_values_depend_on_seed_layer_and_edits_alone() -> None:
    """Every rank, every replay and every device draws the same A; the process's random numbers stay as they are."""
    before = torch.get_rng_state()
    first, again, other, later = (tiny("llama") for _ in range(4))
    adapters.attach(first, RECORD, SPEC)
    torch.randn(3)
    adapters.attach(again, RECORD, SPEC)
    adapters.attach(other, RECORD, dataclasses.replace(SPEC, seed=1))
    record = surgery.apply(later, RECORD, [Remove(2)])
    adapters.attach(later, record, SPEC)
    torch.set_rng_state(before)
    values = [[p for p in adapters.adapters(model) if p.any()] for model in (first, again, other, later)]
    assert all(torch.equal(a, b) for a, b in zip(values[0], values[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(values[0], values[2], strict=True))
    assert not any(torch.equal(a, b) for a in values[0] for b in values[3] if a.shape == b.shape)
    assert len({a.sum().item() for a in values[0]}) == len(values[0]), "no two adapters start alike"


@pytest.mark.parametrize(("targets", "names"), [("attention", {"q", "k", "v", "o"}), ("mlp", {"gate", "up", "down"})])
def test_targets(targets: str, names: set[str]) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    adapters.attach(model, RECORD, dataclasses.replace(SPEC, targets=targets))
    found = [name for name, m in model.named_modules() if isinstance(getattr(m, "lora", None), adapters.Adapter)]
    assert {name.rpartition(".")[2].removesuffix("_proj") for name in found} == names
    assert len(found) == 4 * len(names)
    assert not any("head" in name or "embed" in name for name in found)


def test_compact_blocks_mixers_and_shared_weights() -> None:
    """What earlier stages put in is adapted, what this one puts in trains itself, a weight used twice is left alone."""
    model = tiny("llama")
    record = surgery.apply(model, RECORD, [Replace(0, SLIM), Convert(2, MIXER)])
    blocks = Stack(model).layers
    # a weight that two maps share cannot be merged twice
    up, gate = (blocks[3].get_submodule(f"mlp.{name}_proj") for name in ("up", "gate"))
    gate.register_parameter("weight", up.get_parameter("weight"))
    stage = Stage("two", (Replace(1, SLIM),), train="lora", lora=SPEC)
    record = surgery.apply(model, record, stage.edits)
    adapt(model, record, stage)
    counts = [len(adapters.adapters(block)) // 2 for block in Stack(model).layers]
    assert counts == [7, 0, 7, 5]
    model = tiny("llama")
    record = surgery.apply(model, RECORD, [Convert(2, MIXER)])
    adapt(model, record, dataclasses.replace(stage, edits=(Convert(2, MIXER),)))
    assert len(adapters.adapters(Stack(model).layers[2])) == 2 * 3, "the mixer is new, the norms and the MLP are not"


def test_only_adapters_train_and_have_optimizer_state() -> None:
    """Base weights stay bit for bit; gradients and moments exist for A and B alone; AdamW forgets frozen weights."""
    model, optimizer = tiny("llama"), make_optimizer(OptimSpec(weight_decay=0.5))
    regroup(optimizer, model, RECORD, Stage("before"), {})
    step(model, optimizer)
    assert state_elements(optimizer) == 2 * sum(p.numel() for p in model.parameters())
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapt(model, RECORD, HEAL)
    regroup(optimizer, model, RECORD, HEAL, {})
    check_partition(optimizer, model)
    movement = MovementCheck(3)
    movement.watch(model, watched_parameters(model, RECORD, dataclasses.replace(HEAL, edits=(Remove(3),))))
    losses = []
    for _ in range(30):
        losses.append(step(model, optimizer))
        movement.check_gradients()
        assert not movement.stepped(1.0, skipped=False, last=False)
    assert losses[-1] < losses[0] - 0.1, "it learns"
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert all(p.grad is None for name, p in model.named_parameters() if name in base)
    size = sum(p.numel() for p in adapters.adapters(model))
    assert state_elements(optimizer) == 2 * size < 0.4 * sum(p.numel() for p in base.values())
    assert {group["name"]: bool(group["params"]) for group in optimizer.param_groups if group["decays"]} == {
        "base": True,
        "new": False,
    }


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> float:
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.zero_grad()
    loss = model(windows(), labels=windows()).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def state_elements(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.numel() for state in optimizer.state.values() for k, v in state.items() if k != "step")


def test_gradient_checkpointing_and_autocast() -> None:
    model = tiny("gpt2").train()
    adapt(model, RECORD, HEAL)
    drawn(model)
    regroup(make_optimizer(OptimSpec()), model, RECORD, HEAL, {})
    backward(model, use_cache=False)
    plain = [p.grad.clone() for p in adapters.adapters(model) if p.grad is not None]
    for block in Stack(model).layers:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)
    backward(model, use_cache=False)
    assert all(
        torch.equal(p.grad, g) for p, g in zip(adapters.adapters(model), plain, strict=True) if p.grad is not None
    )
    with torch.autocast("cpu", torch.bfloat16):
        backward(model, use_cache=False)
        low = logits(model)
    assert {p.grad.dtype for p in adapters.adapters(model) if p.grad is not None} == {torch.float32}
    adapters.merge(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model) - low).abs().max() < 0.05


def test_shards_are_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.train=lora adds adapters to whole weights.*use trainer=ddp"):
        check_strategy(FSDP2Strategy(), adapters=True)
    check_strategy(FSDP2Strategy())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, r"schedule\.lora\.rank must be an integer from 1 .*got 0"),
        ({"rank": 2.5}, r"schedule\.lora\.rank must be an integer"),
        ({"rank": True}, r"schedule\.lora\.rank must be an integer"),
        ({"alpha": 0}, r"schedule\.lora\.alpha must be positive .*twice the rank is usual.*got 0"),
        ({"alpha": float("nan")}, r"schedule\.lora\.alpha must be positive"),
        ({"targets": "heads"}, r"schedule\.lora\.targets must be one of .*'attention', 'mlp', 'all'.*got 'heads'"),
        ({"targets": ["mlp"]}, r"schedule\.lora\.targets must be a string, got \['mlp'\]"),
        ({"seed": -1}, r"schedule\.lora\.seed must be"),
        ({"r": 4}, r"schedule\.lora: unknown key 'r'; known are rank, alpha, targets, seed"),
        (4, r"schedule\.lora must be an object"),
    ],
)
def test_wrong_values_are_refused(values: Any, message: str) -> None:
    for use in (
        lambda: Iterative(RemoveLayers(), count=1, train="lora", lora=values),
        lambda: NoEdits(train="lora", lora=values),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match=message):
        stage_from_json({"name": "a", "train": "lora", "lora": values})


def test_settings_that_nobody_would_use_are_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.lora=\{'rank': 4\} is for schedule\.train=lora, and .*=all"):
        Iterative(RemoveLayers(), count=1, lora={"rank": 4})
    assert Iterative(RemoveLayers(), count=1, lora={"rank": 8, "alpha": 16, "targets": "all"}).train == "all"
    with pytest.raises(ValueError, match=r"schedule\.lr=0 in stage 'heal'"):
        adapt(tiny("llama"), RECORD, dataclasses.replace(HEAL, lr=0.0))
    model = tiny("llama", layers=1)
    record = surgery.apply(model, Record(1), [Replace(0, Spec("iskd.blocks.identity.Identity"))])
    with pytest.raises(ValueError, match=r"schedule\.lora\.targets=all: the blocks .* choose schedule\.lora\.targets"):
        adapters.attach(model, record, SPEC)


def test_values_and_json() -> None:
    assert stage_from_json(json.loads(json.dumps(to_json(HEAL)))) == HEAL
    assert stage_from_json({"name": "a", "train": "lora"}).lora == LoraSpec()
    assert lora_of({"rank": 4}, "lora", seed=7) == LoraSpec(4, seed=7)
    assert lora_of({"seed": 3}, "lora", seed=7).seed == 3
    assert lora_of(None, "all", seed=7) == LoraSpec(seed=7)
    assert adapters.merged(HEAL).train == "all"
    assert adapters.merged(Stage("a", train="new")).train == "new"

"""Laws of the optimizer: groups partition what trains, state follows its parameter, the rate is a pure function."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.models import Stack, surgery
from iskd.plan import Convert, Record, Remove, Replace, Spec, Stage
from iskd.training.step.optimizer import OptimSpec, load_optimizer_tensors, make_optimizer, optimizer_tensors
from iskd.training.step.trainable import check_partition, maps, new_parameters, regroup, trainable
from tests.factories import mixer_specs, tiny, windows

BLOCK = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 3, "zero_up": False})
FIRST = Stage("one", (Replace(5, BLOCK, seed=5),))
SECOND = Stage("two", (Replace(1, BLOCK, seed=1), Remove(3)))


def student_after(*stages: Stage) -> tuple[PreTrainedModel, Record]:
    model, record = tiny("llama", layers=7), Record(7)
    for stage in stages:
        record = surgery.apply(model, record, stage.edits)
    return model, record


def with_train(train: str) -> Stage:
    return Stage("two", SECOND.edits, train=train)


def layers_of(model: PreTrainedModel, record: Record, parameters: list[nn.Parameter]) -> set[int]:
    ids = {id(p) for p in parameters}
    blocks = zip(record.layers, Stack(model).layers, strict=True)
    return {layer for layer, block in blocks if any(id(p) in ids for p in block.parameters())}


def held(optimizer: torch.optim.Optimizer, name: str) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups if group["name"] == name for p in group["params"]]


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.zero_grad()
    ids = windows(seed=seed)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("train", "layers"),
    [
        ("all", {0, 1, 2, 4, 5, 6}),
        ("edited", {1, 5}),
        ("new", {1}),
        ("adjacent", {0, 1, 2, 4}),
        (r"\.self_attn\.", {0, 1, 2, 4, 5, 6}),
        (r"^model\.layers\.(0|4)\.", {0, 5}),
        (r"layers\.1\.block\.(up|down)\.", {1}),
        ("embed|norm", {0, 1, 2, 4, 5, 6}),
    ],
)
def test_groups_partition_what_trains(train: str, layers: set[int]) -> None:
    model, record = student_after(FIRST, SECOND)
    stage, optimizer = with_train(train), make_optimizer(OptimSpec())
    regroup(optimizer, model, record, stage, {})
    chosen = trainable(model, record, stage)
    assert layers_of(model, record, chosen) == layers
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in chosen]
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in chosen}
    fresh = {id(p) for p in Stack(model).layers[record.layers.index(1)].parameters()}
    assert {id(p) for p in held(optimizer, "new")} == fresh & set(grouped)
    check_partition(optimizer, model)
    if train == "all":
        assert len(chosen) == len(list(model.parameters()))


def test_only_what_trains_moves() -> None:
    model, record = student_after(FIRST, SECOND)
    optimizer = make_optimizer(OptimSpec(weight_decay=0.5))
    regroup(optimizer, model, record, with_train("adjacent"), {})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    moved = [p for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert {id(p) for p in moved} == {id(p) for p in model.parameters() if p.requires_grad}


def test_what_is_new_is_what_this_stage_put_in_and_still_stands() -> None:
    model, record = student_after(FIRST, SECOND)
    assert layers_of(model, record, new_parameters(model, record, SECOND)) == {1}
    assert layers_of(model, record, new_parameters(model, record, FIRST)) == {5}
    assert new_parameters(model, record, Stage("cut", (Remove(3),))) == []


@pytest.mark.parametrize(("train", "layers"), [("all", {1, 5}), ("new", {1, 5}), ("adjacent", {0, 1, 2, 4, 5, 6})])
def test_what_earlier_stages_put_in_and_did_not_train_is_new_too(train: str, layers: set[int]) -> None:
    model, record = student_after(FIRST, SECOND)
    stage = dataclasses.replace(with_train(train), untrained=len(FIRST.edits))
    assert layers_of(model, record, new_parameters(model, record, stage)) == {1, 5}
    optimizer = make_optimizer(OptimSpec())
    regroup(optimizer, model, record, stage, {})
    assert layers_of(model, record, held(optimizer, "new")) == {1, 5}
    if train != "all":
        assert layers_of(model, record, trainable(model, record, stage)) == layers


@pytest.mark.parametrize("train", ["new", "edited", "nothing_has_this_name"])
def test_a_choice_that_matches_nothing_is_refused(train: str) -> None:
    model, record = student_after()
    with pytest.raises(ValueError, match=f"schedule.train='{train}' matches no parameter of stage 'heal'"):
        trainable(model, record, Stage("heal", train=train))


def test_a_broken_pattern_is_refused() -> None:
    model, record = student_after()
    with pytest.raises(ValueError, match=r"train='layers\.\(' is neither all/edited/new/adjacent/lora nor a regular"):
        trainable(model, record, Stage("heal", train="layers.("))


def test_layer_1_is_not_taken_for_layers_10_and_11() -> None:
    # the published code excluded parameters by the prefix "h.1", which froze layers 10 and 11 as well
    model = tiny("gpt2", layers=12)
    stage = Stage("one", (Replace(1, BLOCK),), train="new")
    record = surgery.apply(model, Record(12), stage.edits)
    assert layers_of(model, record, trainable(model, record, stage)) == {1}


def test_an_edit_keeps_the_state_of_what_survives_and_forgets_the_rest() -> None:
    model, record = student_after(FIRST)
    optimizer = make_optimizer(OptimSpec())
    regroup(optimizer, model, record, FIRST, {})
    groups = [id(group) for group in optimizer.param_groups]
    step(model, optimizer)
    state = {id(p): {key: id(value) for key, value in slots.items()} for p, slots in optimizer.state.items()}
    old = {id(p) for p in model.parameters()}
    assert set(state) == old
    record = surgery.apply(model, record, SECOND.edits)
    regroup(optimizer, model, record, SECOND, {})
    survivors = old & {id(p) for p in model.parameters()}
    assert 0 < len(survivors) < len(old)
    assert {id(p) for p in optimizer.state} == survivors
    for p, slots in optimizer.state.items():
        assert {key: id(value) for key, value in slots.items()} == state[id(p)]
    assert [id(group) for group in optimizer.param_groups] == groups
    assert all(p.grad is None for p in model.parameters())
    # the block of the first stage is now one of the others
    assert layers_of(model, record, held(optimizer, "new")) == {1}
    step(model, optimizer)
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_frozen_parameter_keeps_its_state_for_later() -> None:
    model, record = student_after(FIRST)
    optimizer = make_optimizer(OptimSpec())
    regroup(optimizer, model, record, FIRST, {})
    step(model, optimizer)
    kept = {id(p) for p in optimizer.state}
    regroup(optimizer, model, record, Stage("one", FIRST.edits, train="new"), {})
    assert {id(p) for p in optimizer.state} == kept
    regroup(optimizer, model, record, FIRST, {})
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", mixer_specs())
def test_of_a_mixer_only_linear_maps_decay(name: str) -> None:
    model = tiny("llama")
    surgery.apply(model, Record(4), [Convert(1, mixer_specs()[name])])
    decaying = {id(p) for p in maps(model)}
    for path, module in Stack(model).layers[1].named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            linear = isinstance(module, torch.nn.Linear) and own == "weight"
            assert (id(parameter) in decaying) == linear, f"{path}.{own}"


def test_weight_decay_is_for_matrices() -> None:
    model, record = student_after(FIRST)
    optimizer = make_optimizer(OptimSpec(weight_decay=0.1))
    regroup(optimizer, model, record, FIRST, {})
    for group in optimizer.param_groups:
        assert {p.dim() > 1 for p in group["params"]} <= {group["weight_decay"] > 0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - 0.5 * 0.1 if p.dim() > 1 else 1.0))


def grouped() -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    model, record = student_after(FIRST)
    optimizer = make_optimizer(OptimSpec())
    regroup(optimizer, model, record, FIRST, {})
    return model, optimizer


def test_a_block_swapped_behind_the_optimizer_is_noticed() -> None:
    model, optimizer = grouped()
    surgery.apply(model, Record(7), [Replace(2, BLOCK)])
    with pytest.raises(RuntimeError, match=r"parameters that do not train in the student, e\.g\. one that was removed"):
        check_partition(optimizer, model)


def test_a_block_added_behind_the_optimizer_is_noticed() -> None:
    model, optimizer = grouped()
    Stack(model).layers[0].extra = nn.Linear(2, 2)
    with pytest.raises(
        RuntimeError, match=r"2 trainable parameters are in no optimizer group, e.g. model.layers.0.ext"
    ):
        check_partition(optimizer, model)


def test_a_parameter_in_two_groups_is_noticed() -> None:
    model, optimizer = grouped()
    optimizer.param_groups[-1]["params"].append(next(model.parameters()))
    with pytest.raises(RuntimeError, match="a parameter is in two optimizer groups"):
        check_partition(optimizer, model)


def test_a_frozen_parameter_in_a_group_is_noticed() -> None:
    model, optimizer = grouped()
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"1 parameters that do not train.*e\.g\. model\.embed_tokens\.weight"):
        check_partition(optimizer, model)


def test_a_restored_optimizer_takes_the_same_next_step() -> None:
    one, record = student_after(FIRST)
    first = make_optimizer(OptimSpec(weight_decay=0.1))
    regroup(first, one, record, FIRST, {})
    for seed in range(2):
        step(one, first, seed)
    # frozen parameters have state too
    regroup(first, one, record, Stage("one", FIRST.edits, train="new"), {})
    step(one, first, 2)
    tensors = {key: value.clone() for key, value in optimizer_tensors(first, one).items()}
    names = [name for name, _ in one.named_parameters()]
    assert set(tensors) == {f"{slot}/{name}" for slot in ("step", "exp_avg", "exp_avg_sq") for name in names}
    other, _ = student_after(FIRST)
    other.load_state_dict(one.state_dict())
    second = make_optimizer(OptimSpec(weight_decay=0.1))
    regroup(second, other, record, FIRST, {})
    load_optimizer_tensors(second, other, tensors)
    regroup(first, one, record, FIRST, {})
    for seed in (3, 4):
        step(one, first, seed)
        step(other, second, seed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    again = optimizer_tensors(second, other)
    assert all(torch.equal(value, again[key]) for key, value in optimizer_tensors(first, one).items())


def test_one_kernel_for_all_parameters_is_the_loop_over_them() -> None:
    found = []
    for fused in (True, False):
        model, record = student_after(FIRST)
        optimizer = make_optimizer(OptimSpec(weight_decay=0.1, fused=fused))
        regroup(optimizer, model, record, FIRST, {})
        for seed in range(3):
            step(model, optimizer, seed)
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_state_of_another_student_is_refused() -> None:
    model, optimizer = grouped()
    step(model, optimizer)
    tensors = optimizer_tensors(optimizer, model)
    other, _ = student_after()
    with pytest.raises(ValueError, match=r"names 'model.layers.5.block.*the checkpoint belongs to another student"):
        load_optimizer_tensors(make_optimizer(OptimSpec()), other, tensors)
    key = "exp_avg/model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=r"has shape \[3\], the parameter \[48, 48\]"):
        load_optimizer_tensors(optimizer, model, tensors | {key: torch.zeros(3)})


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("decay_over", ["run", "stage"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("end", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("stages", [(1,), (2, 1, 7), (40, 40)])
def test_rates_are_in_bounds_and_warm_up(
    decay: str, decay_over: str, warmup: float, end: float, stages: tuple[int, ...]
) -> None:
    spec, total, before = OptimSpec(decay=decay, decay_over=decay_over, warmup=warmup, end=end), sum(stages), 0
    for steps in stages:
        rates = [spec.scale(step, steps, before, total) for step in range(steps)]
        assert rates == [spec.scale(step, steps, before, total) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        warm = math.ceil(warmup * steps)
        if decay == "constant":
            assert rates == sorted(rates)
        assert rates[warm:] == sorted(rates[warm:], reverse=True)
        if warm:
            assert rates[0] <= 0.5
        before += steps


@pytest.mark.parametrize(
    ("decay", "middle"), [("constant", 1.0), ("linear", 0.1 + 0.9 * 0.5), ("cosine", 0.1 + 0.9 * 0.5)]
)
def test_a_rate_falls_from_one_to_its_end(decay: str, middle: float) -> None:
    spec = OptimSpec(decay=decay, warmup=0.0, end=0.1)
    assert spec.scale(0, 1000, 0, 1000) == 1.0
    assert spec.scale(500, 1000, 0, 1000) == pytest.approx(middle)
    last = 1.0 if decay == "constant" else 0.1
    assert spec.scale(999, 1000, 0, 1000) == pytest.approx(last, abs=2e-3)


def test_the_warm_up_reaches_the_full_rate_in_equal_steps() -> None:
    spec = OptimSpec(decay="constant", warmup=0.04)
    rates = [spec.scale(step, 100, 0, 100) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_a_rate_falls_over_the_run_or_in_every_stage() -> None:
    over_run, over_stage = (OptimSpec(decay="linear", decay_over=over, warmup=0.0) for over in ("run", "stage"))
    assert [over_run.scale(0, 10, before, 40) for before in (0, 10, 20, 30)] == [1.0, 0.75, 0.5, 0.25]
    assert [over_stage.scale(0, 10, before, 40) for before in (0, 10, 20, 30)] == [1.0] * 4
    # a run that turns out longer than planned goes on falling
    assert 0 < over_run.scale(9, 10, 40, 40) < over_run.scale(0, 10, 40, 40) < 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decay": "exponential"}, "optim.decay='exponential': choose constant, linear, cosine or wsd"),
        ({"decay_over": "epoch"}, "optim.decay_over='epoch': choose run or stage"),
        ({"warmup": 1.0}, r"optim.warmup must be in \[0, 1\)"),
        ({"warmup": -0.1}, r"optim.warmup must be in \[0, 1\)"),
        ({"end": 1.5}, r"optim.end in \[0, 1\]"),
        ({"clip": 0.0}, "optim.clip must be positive or null, got 0.0"),
    ],
)
def test_bad_values_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimSpec(**kwargs)  # type: ignore[arg-type]

"""Alignment layer by layer: values and gradients of one big graph, in the memory of one layer."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from iskd.models import Stack, sharding, surgery
from iskd.models.capture import attention_weights, follow
from iskd.plan import Convert, Record, Remove, Spec, Stage
from iskd.plan.stage import OBJECTIVES
from iskd.training.step.alignment import MATRIX_TOKENS, align, check, pieces
from iskd.training.step.trainable import reachable, regroup, trainable
from tests.factories import FAMILIES, digest, hooks, mixer_specs, modes, tiny, windows

LINEAR = mixer_specs()["linear_attention"]
GLA = mixer_specs()["gla"]
ALIGNED = OBJECTIVES[1:]
MIXED = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SLIDING = [("mistral", {"sliding_window": 5}), ("qwen2", MIXED)]


def converted(teacher: PreTrainedModel, spec: Spec = GLA, layers: tuple[int, ...] = (1, 3), *edits: Remove) -> Any:
    """A student of `teacher` in training mode, with its record."""
    student = copy.deepcopy(teacher).float().train()
    record = Record(len(Stack(teacher).layers))
    record = surgery.apply(student, record, [*(Convert(layer, spec, seed=layer) for layer in layers), *edits])
    return student, record


def training(student: PreTrainedModel, record: Record, objective: str, train: str = "all") -> list[nn.Parameter]:
    """What a stage trains; everything else is frozen, as in a run."""
    optimizer = torch.optim.AdamW(
        [{"params": [], "name": n, "decays": d, "orthogonal": False} for n in ("base", "new") for d in (0, 1)]
    )
    stage = Stage("test", objective=objective, train=train)
    regroup(optimizer, student, record, stage, {})
    return trainable(student, record, stage)


def reference(
    objective: str, student: PreTrainedModel, teacher: PreTrainedModel, record: Record, ids: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    """The whole student in one graph, every layer fed the teacher's stream; the teacher as transformers shows it."""
    ours, theirs = Stack(student), Stack(teacher)
    converted_ = {edit.layer for edit in record.edits if isinstance(edit, Convert)}
    layers = [layer for layer in record.layers if objective == "hidden" or layer in converted_]
    path = "" if objective == "hidden" else ours.family.attn
    modules = {layer: ours.layers[record.layers.index(layer)].get_submodule(path) for layer in layers}
    originals = [block.get_submodule(path) for block in theirs.layers]
    fed: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    found: dict[int, Tensor] = {}

    def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return cast(Tensor, args[0] if args else kwargs["hidden_states"])

    def tensor(output: Any) -> Tensor:
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def swapped(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((fed[layer], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": fed[layer]})

    for layer, original in enumerate(originals):
        original.register_forward_pre_hook(
            lambda _, a, k, i=layer: fed.__setitem__(i, first(a, k)),
            with_kwargs=True,  # type: ignore[misc]
        )
        original.register_forward_hook(lambda _, __, out, i=layer: made.__setitem__(i, tensor(out)))  # type: ignore[misc]
    for layer, module in modules.items():
        module.register_forward_pre_hook(lambda _, a, k, i=layer: swapped(i, a, k), with_kwargs=True)  # type: ignore[misc]
        module.register_forward_hook(lambda _, __, out, i=layer: found.__setitem__(i, tensor(out)))  # type: ignore[misc]
    with torch.no_grad():
        teacher.set_attn_implementation("eager" if objective == "matrix" else "sdpa")
        attentions = teacher(ids, output_attentions=objective == "matrix", use_cache=False).attentions
    student(ids, use_cache=False)
    values = {}
    for layer, module in modules.items():
        if objective == "matrix":
            difference = cast(Any, module).mixer.matrix(fed[layer]).float() - attentions[layer].float()
            values[layer] = difference.square().sum((-2, -1)).sqrt().mean()
        elif objective == "mixer_output":
            values[layer] = (found[layer].float() - made[layer].float()).square().mean()
        else:
            difference = found[layer].float() - made[record.state_after(layer)].float()
            values[layer] = difference.norm(dim=-1).mean()
    return torch.stack(list(values.values())).sum(), values


def gradients(student: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", ALIGNED)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("bf16", [False, True])
def test_value_and_gradient_are_those_of_one_big_graph(objective: str, family: str, bf16: bool) -> None:
    """With a removed layer below which the block learns the state above the gap; autocast as in training."""
    teacher, ids = tiny(family, layers=5), windows()
    edits = (Remove(2),) if objective == "hidden" else ()
    student, record = converted(teacher, GLA, (1, 3), *edits)
    twin, original = copy.deepcopy(student), copy.deepcopy(teacher)
    for model in (student, twin):
        training(model, record, objective, train="edited")
    if objective == "hidden":
        # `edited` blocks alone: the others are as the teacher's, but for the one below the gap
        training(student, record, objective), training(twin, record, objective)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        aligned = align(objective, student, teacher, record, ids)
        loss, values = reference(objective, twin, original, record, ids)
    (aligned.loss / 2).backward()
    (loss / 2).backward()
    torch.testing.assert_close(aligned.loss, loss)
    assert {i: float(v) for i, v in aligned.by_layer.items()} == pytest.approx({i: v.item() for i, v in values.items()})
    ours, theirs = gradients(student), gradients(twin)
    if objective == "hidden":
        inside = {id(p) for p in Stack(twin).layers.parameters()}
        theirs = {name: g for name, g in theirs.items() if id(twin.get_parameter(name)) in inside}
    assert ours.keys() == theirs.keys()
    assert ours
    for name, gradient in ours.items():
        # bf16 sums of another order; a backward pass under autocast, which rounds the core's, is ten times as far
        assert (gradient - theirs[name]).norm() <= (1e-3 if bf16 else 1e-5) * theirs[name].norm(), name


@pytest.mark.parametrize(("family", "config"), [*((family, {}) for family in FAMILIES), *SLIDING])
def test_the_teachers_attention_is_that_of_transformers(family: str, config: dict[str, Any]) -> None:
    """Grouped heads, sliding windows, every family; and the teacher is left as it was."""
    teacher, ids = tiny(family, **config), windows()
    before = (teacher.config._attn_implementation, hooks(teacher), modes(teacher), digest(teacher))
    stack = Stack(teacher)
    attentions = [block.get_submodule(stack.family.attn) for block in stack.layers]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with attention_weights(stack):
        follow(
            stack, ids, [(a, a) for a in attentions], lambda i, call, out: seen.__setitem__(i, (call.stream, out[1]))
        )
    assert (teacher.config._attn_implementation, hooks(teacher), modes(teacher), digest(teacher)) == before
    teacher.set_attn_implementation("eager")
    expected = teacher(ids, output_attentions=True).attentions
    for layer, (_, weight) in seen.items():
        assert weight.shape == (2, stack.dims.heads, 16, 16)
        torch.testing.assert_close(weight, expected[layer])
    assert list(seen) == [0, 1, 2, 3]
    if config:
        assert bool((seen[0][1][..., -1, :8] == 0).all()), "out of the window"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ALIGNED)
def test_every_family_aligns(family: str, objective: str) -> None:
    """Every parameter that trains gets a gradient, and models are left as they were."""
    teacher, ids = tiny(family), windows()
    student, record = converted(teacher)
    parameters = training(student, record, objective)
    before = (hooks(teacher), hooks(student), modes(student), digest(teacher), digest(student))
    align(objective, student, teacher, record, ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert sum(p.grad is not None for p in student.parameters()) == len(parameters)
    assert all(p.grad is None for p in teacher.parameters())
    assert (hooks(teacher), hooks(student), modes(student), digest(teacher), digest(student)) == before


@pytest.mark.parametrize("name", sorted(mixer_specs()))
def test_every_mixer_aligns_or_says_why_not(name: str) -> None:
    teacher, ids = tiny("llama"), windows()
    student, record = converted(teacher, mixer_specs()[name])
    for objective in ALIGNED:
        stage = Stage("a", objective=objective)
        mixer = cast(Any, Stack(student).layers[1].get_submodule("self_attn")).mixer
        if objective == "matrix" and (not mixer.exposes_matrix or mixer.heads != 6):
            with pytest.raises(ValueError, match=rf"{type(mixer).__name__} .*schedule\.mixers=mixer_output"):
                check(student, record, stage)
            continue
        check(student, record, stage)
        parameters = training(student, record, objective)
        align(objective, student, teacher, record, ids).loss.backward()
        assert all(p.grad is not None for p in parameters)


class Peak:
    """Bytes that autograd keeps for a backward pass: now, and at most so far."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> Any:
        box = [tensor]
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        holder = Held(box)
        weakref.finalize(holder, self._free, size)
        return holder

    def _free(self, size: int) -> None:
        self.now -= size


class Held:
    def __init__(self, box: list[Tensor]) -> None:
        self.box = box


def peak_of(step: Callable[[], Tensor]) -> int:
    peak = Peak()
    with saved_tensors_hooks(peak.keep, lambda held: held.box[0]):
        loss = step()
        at_end = peak.now
        loss.backward()
    assert peak.now <= at_end
    return peak.most


@pytest.mark.parametrize("objective", ALIGNED)
def test_the_graph_in_memory_is_that_of_one_layer(objective: str) -> None:
    teacher, ids = tiny("llama", layers=6), windows()
    peaks = {}
    for layers in ((2,), (0, 1, 2, 3, 4, 5)):
        student, record = converted(teacher, GLA, layers)
        training(student, record, objective, train="edited")
        peaks[len(layers)] = peak_of(lambda s=student, r=record: align(objective, s, teacher, r, ids).loss)  # type: ignore[misc]
    whole = peak_of(lambda: reference(objective, student, copy.deepcopy(teacher), record, ids)[0])
    assert peaks[6] <= 1.1 * peaks[1]
    assert whole > 4 * peaks[6]


def test_blocks_that_are_the_teachers_are_at_no_distance() -> None:
    """Gradients at zero are zero, not NaN; the converted one is away."""
    teacher = tiny("llama")
    student, record = converted(teacher, GLA, (2,))
    training(student, record, "hidden")
    aligned = align("hidden", student, teacher, record, windows())
    assert {layer: bool(value) for layer, value in aligned.by_layer.items()} == {0: False, 1: False, 2: True, 3: False}
    aligned.loss.backward()
    for position, block in enumerate(Stack(student).layers):
        norm = sum(float(cast(Tensor, p.grad).norm()) for p in block.parameters())
        assert norm > 0 if position == 2 else norm == 0
    training(student, record, "hidden", train="edited")
    assert list(align("hidden", student, teacher, record, windows()).by_layer) == [2], "frozen blocks cost nothing"


def test_long_windows_are_cut_into_pieces() -> None:
    def shape(batch: int, tokens: int) -> tuple[int, ...]:
        return tuple(pieces(torch.arange(batch * tokens).reshape(batch, tokens)).shape)

    assert [shape(2, t) for t in (7, 512, 513, 1024, 1537)] == [(2, 7), (2, 512), (4, 256), (4, 512), (8, 384)]
    ids = torch.arange(2 * 3 * MATRIX_TOKENS).reshape(2, -1)
    assert torch.equal(pieces(ids).flatten(), ids.flatten())


@pytest.mark.parametrize(
    ("objective", "there", "absent"),
    [
        ("matrix", {"q_proj", "k_proj"}, {"v_proj", "o_proj", "mlp", "embed", "norm"}),
        ("mixer_output", {"q_proj", "v_proj", "o_proj"}, {"mlp", "embed", "layernorm"}),
        ("hidden", {"q_proj", "o_proj", "mlp", "layernorm"}, {"embed", "lm_head", "model.norm"}),
    ],
)
def test_what_an_objective_cannot_reach_stays_frozen(objective: str, there: set[str], absent: set[str]) -> None:
    student, record = converted(tiny("llama"), LINEAR)
    ids = {id(p) for p in training(student, record, objective)}
    names = [name for name, p in student.named_parameters() if id(p) in ids]
    assert all(any(word in name for name in names) for word in there)
    assert not any(word in name for name in names for word in absent)
    assert reachable(student, record, "loss") == {id(p) for p in student.parameters()}
    with pytest.raises(ValueError, match=rf"train='embed' matches no parameter .* objective \({objective}\)"):
        training(student, record, objective, train="embed")


@pytest.mark.parametrize("objective", ALIGNED)
@pytest.mark.parametrize("spec", [LINEAR, GLA])
def test_one_batch_is_learnt(objective: str, spec: Spec) -> None:
    """From random projections: copied ones are close already, where a random teacher's attention is almost flat."""
    teacher, ids = tiny("llama"), windows()
    student, record = converted(teacher, replace(spec, kwargs={**spec.kwargs, "init": "random"}))
    optimizer = torch.optim.Adam(training(student, record, objective, train="edited"), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = align(objective, student, teacher, record, ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_an_objective_that_cannot_work_is_refused_before_training() -> None:
    teacher = tiny("llama")
    skeleton = surgery.rebuild(teacher, Record(4), "meta")
    for objective in ("matrix", "mixer_output"):
        with pytest.raises(ValueError, match=r"stage 'a' has objective=.*no layer is converted by then"):
            check(skeleton, Record(4), Stage("a", objective=objective))
    wide = replace(GLA, kwargs={**GLA.kwargs, "heads": 3})
    student, record = converted(teacher, wide)
    with pytest.raises(ValueError, match=r"layer 1: \w+ mixes with 3 heads and the teacher's attention with 6"):
        check(student, record, Stage("a", objective="matrix"))
    training(student, record, "matrix")
    with pytest.raises(ValueError, match=r"mixes with 3 heads .* use schedule.mixers=mixer_output"):
        align("matrix", student, teacher, record, windows())
    check(student, record, Stage("a", objective="mixer_output"))
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="objective=hidden compares layers that train, and none does"):
        align("hidden", student, teacher, record, windows())


def test_a_student_in_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    student, record = converted(tiny("llama"))
    monkeypatch.setattr(sharding, "is_sharded", lambda _: True)
    for refused in (
        partial(align, "hidden", student, tiny("llama"), record, windows()),
        partial(reachable, student, record, "matrix"),
    ):
        with pytest.raises(ValueError, match=r"use trainer=ddp, or schedule\.mixers=null schedule\.hidden=false"):
            refused()

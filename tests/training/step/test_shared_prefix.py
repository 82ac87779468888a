"""The shared prefix: loss and gradients of the unshared step, bit for bit, and no sharing where that would be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.losses.ce import CrossEntropy
from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.models import Stack, surgery
from iskd.plan import Convert, Edit, Record, Remove, Replace, Stage
from iskd.training.editing import adapt
from iskd.training.step.module import DistillModule
from iskd.training.step.optimizer import OptimSpec, make_optimizer
from iskd.training.step.shared_prefix import SharedPrefix, standing_in
from iskd.training.step.trainable import regroup
from tests.factories import FAMILIES, digest, hooks, tiny, windows
from tests.runs import BOTTLENECK, MIXER, SLIM

LAYERS = 6
TERMS = {"kl": (KL(), 1.0), "ce": (CrossEntropy(), 0.5), "hidden": (HiddenMatch("normalized", "all"), 0.5)}
MIXED: tuple[Edit, ...] = (Replace(3, BOTTLENECK), Remove(4), Convert(5, MIXER))
FOURTH = r"\.4\."  # parameters of the block at position 4


def distilled(
    teacher: PreTrainedModel, edits: tuple[Edit, ...] = (), train: str = FOURTH, *, share: bool = True
) -> DistillModule:
    """A student of the teacher in the middle of a stage."""
    student, teacher = copy.deepcopy(teacher), copy.deepcopy(teacher)
    record = surgery.apply(student, Record(LAYERS), edits)
    module = DistillModule(student, teacher, TERMS, OptimSpec(), record, share_prefix=share)
    module.enter(Stage("heal", edits, train=train))
    adapt(student, record, module.stage)
    return module


def optimizer_of(module: DistillModule) -> torch.optim.Optimizer:
    optimizer = make_optimizer(module.optim)
    regroup(optimizer, module.student, module.record, module.stage, {})
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    return optimizer


def calls(model: PreTrainedModel) -> list[int]:
    """A list that grows by the position of every block that is run."""
    found: list[int] = []
    for position, block in enumerate(Stack(model).layers):
        block.register_forward_pre_hook(lambda *_, position=position: found.append(position))
    return found


def depth(module: DistillModule) -> int:
    optimizer_of(module)
    return SharedPrefix().depth(module.student, module.teacher, module.record)


def trained(module: DistillModule, steps: int = 2) -> list[dict[str, Tensor]]:
    """Losses and gradients of some steps with updates between them."""
    optimizer, found = optimizer_of(module), []
    for step in range(steps):
        result = module.step(windows(seed=step))
        result.loss.backward()
        grads = {name: p.grad.clone() for name, p in module.student.named_parameters() if p.grad is not None}
        found.append({"loss": result.loss.detach(), **result.terms, **grads})
        optimizer.step()
        optimizer.zero_grad()
    return found


def check_equal(teacher: PreTrainedModel, edits: tuple[Edit, ...], train: str, shared: int) -> None:
    together, apart = (distilled(teacher, edits, train, share=share) for share in (True, False))
    assert depth(together) == shared
    ran, ran_apart, ran_teacher = calls(together.student), calls(apart.student), calls(together.teacher)
    for ours, reference in zip(trained(together), trained(apart), strict=True):
        assert ours.keys() == reference.keys()
        assert len(ours) >= 5
        assert all(torch.equal(ours[name], reference[name]) for name in ours)
    blocks = len(together.record.layers)
    assert ran == 2 * list(range(shared, blocks))
    assert ran_apart == 2 * list(range(blocks))
    assert ran_teacher == 2 * list(range(LAYERS))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_unshared_step(family: str) -> None:
    check_equal(tiny(family, layers=LAYERS), MIXED, "edited", shared=3)


@pytest.mark.parametrize(
    ("edits", "train", "shared"),
    [
        ((), FOURTH, 4),
        ((), "norm", 0),
        ((Remove(3),), "adjacent", 2),
        ((Remove(0),), r"\.4\.", 0),
        ((Replace(4, SLIM),), "edited", 4),
        ((Replace(2, BOTTLENECK),), "new", 2),
        ((Convert(3, MIXER),), "new", 3),
        ((Replace(3, SLIM),), "adjacent", 2),
        ((Replace(3, SLIM),), "all", 0),
        ((), "lm_head", LAYERS),
    ],
)
def test_what_is_shared_follows_edits_and_training(edits: tuple[Edit, ...], train: str, shared: int) -> None:
    check_equal(tiny("llama", layers=LAYERS, tie_word_embeddings=False), edits, train, shared)


def test_gradients_are_equal_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check_equal(tiny("qwen3", layers=LAYERS), MIXED, "edited", shared=3)


def perturb(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).add_(1e-3)


def eager(module: DistillModule) -> None:
    module.student.config._attn_implementation = "eager"


CHANGES: dict[str, tuple[int, Callable[[DistillModule], object]]] = {
    "nothing": (4, lambda _: None),
    "block 0 trained before": (0, lambda module: perturb(Stack(module.student).layers[0])),
    "block 2 trained before": (2, lambda module: perturb(Stack(module.student).layers[2])),
    "block 5 trained before": (4, lambda module: perturb(Stack(module.student).layers[5])),
    "embedding trained before": (0, lambda module: perturb(module.student.get_input_embeddings())),
    "final norm trained before": (4, lambda module: perturb(Stack(module.student).base.get_submodule("norm"))),
    "another teacher": (1, lambda module: perturb(Stack(module.teacher).layers[1])),
    "a teacher in half precision": (0, lambda module: nn.Module.to(module.teacher, torch.bfloat16)),
    "another attention kernel": (0, eager),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_else_than_the_teachers_function_is_shared(name: str) -> None:
    shared, change = CHANGES[name]
    module = distilled(tiny("llama", layers=LAYERS))
    change(module)
    assert depth(module) == shared


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "opt", "gpt_neox"])
def test_dropout_in_training_mode_is_not_shared(family: str) -> None:
    module = distilled(tiny(family, layers=LAYERS, dropout=0.1))
    assert depth(module) == 0
    module.student.eval()
    assert depth(module) == 4


def test_dropped_layers_are_not_shared() -> None:
    assert depth(distilled(tiny("opt", layers=LAYERS, layerdrop=0.1))) == 0


@pytest.mark.parametrize(("family", "train"), [("llama", r"embed|\.4\."), ("gpt2", r"wte|\.4\."), ("gpt2", "wpe")])
def test_an_embedding_that_trains_is_not_shared(family: str, train: str) -> None:
    """Tied to the head it is the head's weight."""
    model = tiny(family, layers=LAYERS, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert depth(distilled(model, train=train)) == 0
    assert depth(distilled(model)) == 4


def test_adapters_in_the_prefix_are_not_shared() -> None:
    module = distilled(tiny("llama", layers=LAYERS), train="lora")
    assert depth(module) == 0


def test_a_change_after_the_first_step_is_seen() -> None:
    module, prefix = distilled(tiny("llama", layers=LAYERS)), SharedPrefix()

    def now() -> int:
        return prefix.depth(module.student, module.teacher, module.record)

    optimizer_of(module)
    assert [now(), now()] == [4, 4]
    perturb(Stack(module.student).layers[1])
    assert now() == 1
    block = Stack(module.student).layers[0]
    block.requires_grad_(True)
    assert now() == 0
    perturb(block)
    block.requires_grad_(False)
    assert now() == 0
    module.hold(copy.deepcopy(module.teacher), module.record)
    assert now() == LAYERS
    module.hold(module.student, Record(LAYERS).extended([Replace(2, SLIM)]))
    assert now() == 2


def inner_dropout(module: DistillModule) -> None:
    """A mode that only a module inside a block has."""
    inner = next(module for module in Stack(module.student).layers[1].modules() if isinstance(module, nn.Dropout))
    inner.train()


def buffer(module: DistillModule) -> None:
    block = Stack(module.student).layers[2]
    with torch.no_grad():
        next(block.buffers()).add_(1)


def exchanged_buffer(module: DistillModule) -> None:
    """As transformers does when rotary frequencies follow the length."""
    rotary = Stack(module.student).base.get_submodule("rotary_emb")
    rotary.register_buffer("inv_freq", rotary.get_buffer("inv_freq") * 2, persistent=False)


LATER: dict[str, tuple[str, int, Callable[[DistillModule], object]]] = {
    "a mode inside a block": ("gpt2", 1, inner_dropout),
    "the teacher's mode": ("gpt2", 0, lambda module: module.teacher.train()),
    "a buffer": ("llama", 2, buffer),
    "another buffer": ("llama", 0, exchanged_buffer),
    "the student's attention kernel": ("llama", 0, eager),
    "the teacher's attention kernel": (
        "llama", 0, lambda module: setattr(module.teacher.config, "_attn_implementation", "eager")
    ),
    "a weight": ("llama", 1, lambda module: perturb(Stack(module.student).layers[1])),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_nothing_that_a_run_can_change_goes_unseen(name: str) -> None:
    family, shared, change = LATER[name]
    module, prefix = distilled(tiny(family, layers=LAYERS, **({"dropout": 0.1} if family == "gpt2" else {}))), None
    for model in (module.student, module.teacher):
        model.eval()
        for block in Stack(model).layers:
            block.register_buffer("extra", torch.zeros(1))
    optimizer_of(module)
    prefix = SharedPrefix()
    assert prefix.depth(module.student, module.teacher, module.record) == 4
    change(module)
    assert prefix.depth(module.student, module.teacher, module.record) == shared


def test_the_student_is_whole_again_after_a_pass() -> None:
    model, ids = tiny("llama", layers=LAYERS), windows()
    before, blocks = digest(model), list(Stack(model).layers)

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    handle = blocks[4].register_forward_pre_hook(stop)
    with pytest.raises(Stop), standing_in(Stack(model), 3, torch.zeros(2, 16, 48)):
        model(ids)
    handle.remove()
    assert list(Stack(model).layers) == blocks
    assert (digest(model), hooks(model)) == (before, 0)

"""What terms can give a gradient, and that nothing else trains: DDP waits for the gradient of every parameter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from iskd.losses import Terms
from iskd.losses.base import kept_tokens
from iskd.losses.ce import CrossEntropy
from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.losses.kl_sum import FinalState
from iskd.models import Signals, surgery
from iskd.plan import Edit, Record, Remove, Replace, Stage
from iskd.training.step.module import DistillModule
from iskd.training.step.optimizer import OptimSpec, make_optimizer
from iskd.training.step.passes import Wanted, both
from iskd.training.step.trainable import check_partition, regroup, within_reach
from tests.factories import tiny, windows
from tests.runs import SLIM

LAYERS = 5
UP_TO_2: Terms = {"hidden": (HiddenMatch(layers=[2]), 1.0)}
UP_TO_TOP: Terms = {"hidden": (HiddenMatch(), 1.0)}
END: Terms = {"end": (FinalState(), 1.0)}
ALL: Terms = {"kl": (KL(), 1.0)}
OFF: Terms = {"kl": (KL(), 0.0), **UP_TO_2}
BELOW_A_GAP: Terms = {"hidden": (HiddenMatch(layers="edited"), 1.0)}


def module_of(
    terms: Terms, edits: tuple[Edit, ...] = (), train: str = "all", *, tokens: int = 64, **config: Any
) -> DistillModule:
    """A student whose parameters all require gradients, not yet in the hands of an optimizer."""
    teacher = tiny("llama", layers=LAYERS, **config)
    student = copy.deepcopy(teacher)
    record = surgery.apply(student, Record(LAYERS), edits)
    module = DistillModule(student, teacher, terms, OptimSpec(), record, share_prefix=False)
    module.enter(Stage("heal", edits, tokens, train))
    return module


def names(model: PreTrainedModel, ids: set[int]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def with_gradient(module: DistillModule) -> set[str]:
    module.student.requires_grad_(True)
    module.student.zero_grad()
    module.step(windows()).loss.backward()
    return {name for name, parameter in module.student.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("terms", "edits"),
    [
        (UP_TO_2, ()),
        (OFF, ()),
        (UP_TO_TOP, ()),
        (END, ()),
        (ALL, ()),
        ({**UP_TO_2, **ALL}, ()),
        ({**UP_TO_2, **END}, ()),
        (UP_TO_2, (Remove(1),)),
        (UP_TO_2, (Replace(1, SLIM), Remove(4))),
        (BELOW_A_GAP, (Remove(3),)),
    ],
)
def test_within_reach_is_what_gets_a_gradient(terms: Terms, edits: tuple[Edit, ...], tied: bool) -> None:
    module = module_of(terms, edits, tie_word_embeddings=tied)
    reached = names(module.student, within_reach(module.student, terms, module.record, module.stage))
    assert reached == with_gradient(module)
    assert reached
    on_logits = any(weight > 0 and "logits" in loss.needs for loss, weight in terms.values())
    everything = on_logits or (tied and "end" in terms)
    assert everything == (len(reached) == len(list(module.student.named_parameters())))


@torch.no_grad()
def test_the_final_state_is_the_one_that_hosts_hand_out() -> None:
    """Granite divides its logits by a number, here what the head reads; the published distance knows nothing of it."""
    teacher = tiny("granite", layers=LAYERS, logits_scaling=8.0)
    student = copy.deepcopy(teacher)
    record = surgery.apply(student, Record(LAYERS), (Remove(1),))
    signals = both(student, teacher, record, windows(), Wanted(last=True), Wanted(last=True))
    ours, theirs = (model(windows(), output_hidden_states=True).hidden_states[-1] for model in (student, teacher))
    assert signals[1] is not None
    torch.testing.assert_close(FinalState()(signals[0], signals[1]), (ours - theirs).square().mean(-1))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Step(nn.Module):
    """What a strategy wraps."""

    def __init__(self, module: DistillModule) -> None:
        super().__init__()
        self.student, self.step = module.student, module.step

    def forward(self, seed: int) -> torch.Tensor:
        return self.step(windows(seed=seed)).loss


def two_steps(module: DistillModule) -> None:
    wrapped = DistributedDataParallel(Step(module))
    for seed in range(2):
        wrapped(seed).backward()


@pytest.mark.usefixtures("alone")
def test_ddp_needs_what_is_out_of_reach_to_be_frozen() -> None:
    module = module_of(UP_TO_2, (Remove(1),))
    optimizer = make_optimizer(module.optim)
    regroup(optimizer, module.student, module.record, module.stage, {})
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        two_steps(module)
    (said,) = regroup(optimizer, module.student, module.record, module.stage, UP_TO_2)
    two_steps(module)
    check_partition(optimizer, module.student)
    frozen = {name for name, parameter in module.student.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    assert f"{len(frozen)} parameters stay frozen in stage 'heal', loss=[hidden] reads nothing" in said


def test_what_is_out_of_reach_keeps_its_state_and_trains_again() -> None:
    module = module_of(ALL, (Remove(1),))
    optimizer, student, record, stage = make_optimizer(module.optim), module.student, module.record, module.stage
    regroup(optimizer, student, record, stage, {})
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    module.step(windows()).loss.backward()
    optimizer.step()
    before, held = copy.deepcopy(student.state_dict()), len(optimizer.state)
    module.terms = UP_TO_2
    assert regroup(optimizer, student, record, stage, UP_TO_2)
    module.step(windows()).loss.backward()
    optimizer.step()
    reached = names(student, within_reach(student, UP_TO_2, record, stage))
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in reached), name
    assert len(optimizer.state) == held
    assert regroup(optimizer, student, record, stage, ALL) == []
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(student.parameters()))


@pytest.mark.parametrize(
    ("edits", "train", "message"),
    [
        ((Replace(4, SLIM),), "all", r"loss=\[hidden\] reads nothing that .*layers\.4\..* has a part in: .* 'heal'"),
        (
            (),
            r"layers\.4\.",
            r"reads nothing that .*layers\.4\..*schedule\.train=layers.*add a loss on logits, e\.g\. kl",
        ),
    ],
)
def test_a_stage_that_could_learn_nothing_is_refused(edits: tuple[Edit, ...], train: str, message: str) -> None:
    module = module_of(UP_TO_2, edits, train)
    optimizer = make_optimizer(module.optim)
    with pytest.raises(ValueError, match=message):
        regroup(optimizer, module.student, module.record, module.stage, UP_TO_2)


def test_stages_without_training_are_left_alone() -> None:
    module = module_of(UP_TO_2, (Replace(4, SLIM),), tokens=0)
    optimizer = make_optimizer(module.optim)
    assert regroup(optimizer, module.student, module.record, module.stage, UP_TO_2) == []
    assert all(parameter.requires_grad for parameter in module.student.parameters())


def test_a_pass_knows_its_tokens() -> None:
    module = module_of({"ce": (CrossEntropy(), 1.0)})
    ours, _ = both(module.student, module.teacher, module.record, windows(), Wanted(last=True), None)
    found = kept_tokens(ours)
    assert ours.known is not None  # type: ignore[attr-defined]
    assert found is ours.known[1]  # type: ignore[attr-defined]
    assert torch.equal(found, kept_tokens(Signals(ours.labels)))

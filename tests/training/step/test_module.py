"""One step: which blocks run for which terms, and that what is left out changes no loss."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from iskd.data import StageLoader
from iskd.losses import Terms
from iskd.losses.ce import CrossEntropy
from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.losses.kl_sum import FinalState
from iskd.models import IGNORE, Signals, Stack, surgery
from iskd.models.capture import capture
from iskd.models.packing import with_successor
from iskd.models.signals import next_tokens
from iskd.plan import Convert, Edit, Record, Remove, Stage
from iskd.teacher import TeacherCacheSpec
from iskd.training.step.module import DistillModule
from iskd.training.step.optimizer import OptimSpec, make_optimizer
from iskd.training.step.passes import Wanted, wanted
from iskd.training.step.trainable import regroup
from tests.factories import VOCAB, hooks, tiny, tiny_teacher, windows
from tests.runs import MIXER

LAYERS = 5
CE, DIVERGENCE = (CrossEntropy(), 1.0), (KL(), 1.0)


def module_of(terms: Terms, edits: tuple[Edit, ...] = (), **settings: Any) -> DistillModule:
    teacher = tiny("llama", layers=LAYERS)
    student = copy.deepcopy(teacher)
    record = surgery.apply(student, Record(LAYERS), edits)
    module = DistillModule(student, teacher, terms, OptimSpec(), record)
    module.enter(Stage("heal", edits, **settings))
    regroup(make_optimizer(module.optim), student, record, module.stage, {})
    return module


def calls(model: nn.Module) -> list[int]:
    """A list that grows by the position of every block that is run."""
    found: list[int] = []
    for position, block in enumerate(Stack(model).layers):  # type: ignore[arg-type]
        block.register_forward_pre_hook(lambda *_, position=position: found.append(position))
    return found


ALL = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("terms", "edits", "ran", "ran_teacher"),
    [
        ({"ce": CE}, (), ALL, []),
        ({"ce": CE, "kl": (KL(), 0.0), "hidden": (HiddenMatch(), 0.0)}, (), ALL, []),
        ({"kl": DIVERGENCE}, (), ALL, ALL),
        ({"end": (FinalState(), 1.0)}, (), ALL, ALL),
        ({"hidden": (HiddenMatch(layers=[2]), 1.0)}, (), [0, 1, 2], [0, 1, 2]),
        ({"hidden": (HiddenMatch(layers=[2]), 1.0), "kl": (KL(), 0.0)}, (), [0, 1, 2], [0, 1, 2]),
        ({"ce": CE, "hidden": (HiddenMatch(layers=[0, 2]), 1.0)}, (), ALL, [0, 1, 2]),
        ({"kl": DIVERGENCE, "hidden": (HiddenMatch(layers=[2]), 1.0)}, (), ALL, ALL),
        # the survivor below the gap stands for the state above it
        ({"hidden": (HiddenMatch(layers="edited"), 1.0)}, (Remove(2),), [0, 1], [0, 1, 2]),
        ({"hidden": (HiddenMatch(layers="all"), 1.0)}, (Remove(4),), [0, 1, 2, 3], ALL),
    ],
)
def test_no_block_runs_that_no_term_needs(
    terms: Terms, edits: tuple[Edit, ...], ran: list[int], ran_teacher: list[int]
) -> None:
    module = module_of(terms, edits)
    student, teacher = calls(module.student), calls(module.teacher)
    module.step(windows()).loss.backward()
    assert (student, teacher) == (ran, ran_teacher)
    assert all(p.grad is None for p in module.teacher.parameters())


def test_an_alignment_stage_ends_with_its_last_layer() -> None:
    module = module_of({"ce": CE}, (Convert(1, MIXER),), train="new", objective="mixer_output")
    student, teacher = calls(module.student), calls(module.teacher)
    module.step(windows()).loss.backward()
    assert (student, teacher) == ([], [0, 1])


def test_a_pass_that_ends_early_gives_the_loss_of_a_whole_one() -> None:
    loss = HiddenMatch("normalized", [1, 3])
    module = module_of({"hidden": (loss, 2.0)}, (Remove(2),))
    found = module.step(windows())
    found.loss.backward()
    gradients = {name: p.grad for name, p in module.student.named_parameters() if p.grad is not None}

    def states(model: Any, layers: Any, wanted: set[int]) -> dict[int, Tensor]:
        with capture(Stack(model), layers, wanted) as kept:
            model(windows())
        return kept

    ours = states(module.student, module.record.layers, {1, 3})
    theirs = states(module.teacher, range(LAYERS), {2, 3})
    labels = next_tokens(windows())
    values = loss(Signals(labels, hidden=ours), Signals(labels, hidden={1: theirs[2], 3: theirs[3]}))
    expected = 2 * values[labels != IGNORE].mean()
    module.student.zero_grad()
    expected.backward()
    assert torch.equal(found.loss, expected)
    assert len(gradients) > 5
    assert all(torch.equal(gradients[name], module.student.get_parameter(name).grad) for name in gradients)
    assert hooks(module.student) == hooks(module.teacher) == 0


def test_a_step_under_bf16_autocast_is_that_of_float32_up_to_rounding() -> None:
    """Loss, its terms and the gradient, of a model that has learnt something; gradients are float32 in both."""
    terms: Terms = {"ce": CE, "kl": DIVERGENCE, "hidden": (HiddenMatch("normalized"), 0.5)}
    teacher = tiny_teacher()
    count = len(Stack(teacher).layers)
    results, gradients = [], []
    for mixed in (False, True):
        student = copy.deepcopy(teacher).requires_grad_(True)
        record = surgery.apply(student, Record(count), [Remove(1)])
        module = DistillModule(student, teacher, terms, OptimSpec(), record)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            result = module.step(windows(8, 64))
        result.loss.backward()
        found = [p.grad for p in student.parameters() if p.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in found)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        results.append(
            {"loss": float(result.loss.detach()), **{name: float(mean) for name, mean in result.terms.items()}}
        )
    assert results[1] == pytest.approx(results[0], rel=2e-2)  # 8 bits a number: each rounding is up to 0.4 % off
    assert results[1] != results[0]
    torch.testing.assert_close(torch.cosine_similarity(*gradients, dim=0), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert float(gradients[1].norm()) == pytest.approx(float(gradients[0].norm()), rel=1e-2)


def test_terms_say_what_they_read() -> None:
    record, stage = Record(4).extended([Remove(2)]), Stage("heal", (Remove(2),))
    terms: Terms = {"kl": (KL(), 0.0), "ce": CE, "a": (HiddenMatch(layers="stage"), 1.0), "b": (FinalState(), 0.0)}
    assert wanted(terms, record, stage) == Wanted(frozenset({1}), last=True)
    assert wanted(terms, record, stage, of_teacher=True) == Wanted(frozenset({1}), last=False)
    assert wanted({"ce": CE}, record, stage, of_teacher=True) is None
    assert wanted({"end": (FinalState(), 1.0)}, record, stage, of_teacher=True) == Wanted(frozenset(), last=True)


def test_terms_that_are_all_off_are_refused() -> None:
    module = module_of({"kl": (KL(), 0.0)})
    teacher = calls(module.teacher)
    with pytest.raises(ValueError, match="every loss weight is 0"):
        module.step(windows())
    assert teacher == []


def test_layers_that_are_gone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"HiddenMatch.* has no layer to compare"):
        module_of({"hidden": (HiddenMatch(layers=[2]), 1.0)}, (Remove(2),)).step(windows())


class Cached:
    """Stands for a teacher cache: zeros for the last hidden states, and what was asked for."""

    spec = TeacherCacheSpec()

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def read(self, indices: list[int]) -> dict[str, Tensor]:
        self.asked.append(indices)
        return {"last_hidden": torch.zeros(len(indices), 16, 48, dtype=torch.float16)}


def test_training_reads_the_cache_by_window_and_leaves_the_teacher_alone() -> None:
    module, texts = module_of({"kl": DIVERGENCE, "ce": CE}), windows(12).numpy().astype(np.uint16)
    cache = Cached()
    module.use_teacher_cache(cast(Any, cache))
    loader = StageLoader(texts, batch_size=2, seed=0, first_step=1, steps=3)
    batches = list(loader)
    assert all(np.array_equal(b["input_ids"], texts[b["index"]].astype(np.int64)) for b in batches)
    teacher = calls(module.teacher)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, log_every_n_steps=1, **quiet)
    trainer.fit(module, loader)
    assert cache.asked == [batch["index"] for batch in batches]
    assert teacher == []
    module.step(windows())
    assert teacher == ALL
    with pytest.raises(ValueError, match="give batches an 'index'"):
        module.training_step({"input_ids": windows()}, 0)


class Count(Callback):
    """Moves the module's position on, as the stage loop does."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.enter(pl_module.stage, replace(pl_module.position, step=pl_module.position.step + 1))


@pytest.mark.parametrize(("first", "taken"), [(0, 2), (3, 3)])
def test_values_are_made_only_at_the_steps_that_loggers_take(
    first: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second step of the run, wherever this process began."""
    module = module_of({"ce": CE})
    module.enter(module.stage, replace(module.position, step=first))
    log = module.log_dict
    made: list[set[str]] = []

    def log_dict(values: dict[str, Any], **how: Any) -> None:
        made.append(set(values))
        log(values, **how)

    monkeypatch.setattr(module, "log_dict", log_dict)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, log_every_n_steps=2, **quiet)
    trainer.callbacks.append(Count())  # type: ignore[attr-defined]
    trainer.fit(module, StageLoader(windows(12).numpy(), batch_size=2, seed=0, first_step=0, steps=5))
    assert len(made) == 2 * taken  # the losses, and the norm of the gradients
    assert {"train/loss", "train/grad_norm", "tokens"} <= {name for names in made for name in names}
    assert "train/loss" in trainer.callback_metrics


def test_documents_apart_train_alike_in_every_layout_of_micro_batches() -> None:
    """Windows of a step hold documents of very different lengths; loss and gradients are those of the whole step."""
    length = 24
    student, teacher, separator = tiny("llama", seed=1), tiny("llama", seed=2), 0
    module = DistillModule(student, teacher, {"kl": (KL(), 1.0)}, OptimSpec(), Record(4), separator=separator)
    windows = torch.randint(1, VOCAB, (4, length), generator=torch.Generator().manual_seed(0))
    windows[0, ::2] = separator
    windows[1, length // 2] = separator
    found = []
    for size in (4, 2, 1):
        student.zero_grad()
        losses = []
        for batch in windows.split(size):
            part = module.training_step({"input_ids": batch, "kept": with_successor(batch, separator)}, 0)
            loss = part * (size / len(windows))
            loss.backward()
            losses.append(loss.detach())
        gradients = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        found.append((torch.stack(losses).sum(), gradients))
    whole, *others = found
    for loss, gradients in others:
        torch.testing.assert_close(loss, whole[0], rtol=1e-6, atol=0)
        assert (gradients - whole[1]).norm() <= 1e-6 * whole[1].norm()

"""One step: which blocks run for which terms, and that what is left out changes no loss."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
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
from iskd.models.packing import Separator, with_successor
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
    assert len(made) == taken
    assert {"train/loss", "train/grad_norm", "tokens"} <= {name for names in made for name in names}
    assert "train/loss" in trainer.callback_metrics


def top_rows(length: int) -> Any:
    """Stands for a teacher cache of the likeliest tokens: those of a window depend on its number alone."""
    ids = torch.stack([torch.randperm(VOCAB, generator=torch.Generator().manual_seed(n))[:3] for n in range(4)])
    log_probs = torch.log_softmax(torch.arange(16.0, dtype=torch.float64).view(4, 4), -1)

    def read(index: list[int]) -> dict[str, Tensor]:
        rows = {"ids": ids[index], "log_probs": log_probs[index]}
        return {name: row[:, None].expand(-1, length, -1) for name, row in rows.items()}

    return SimpleNamespace(spec=TeacherCacheSpec("topk", top_k=3), read=read)


@pytest.mark.parametrize("path", ["chunks", "whole logits", "top k", "hidden states", "autograd"])
@pytest.mark.parametrize("length", [2, 3, 24])
def test_documents_apart_train_alike_in_every_layout_of_micro_batches(length: int, path: str) -> None:
    """Windows of a step hold documents of very different lengths, one of them no label: all is as of the whole step.

    A micro-batch without a label is a loss of 0 with a gradient of 0 for whatever trains, since DDP waits for it.
    """
    student, teacher, separator = tiny("llama", seed=1).double(), tiny("llama", seed=2).double(), Separator(0)
    teacher = copy.deepcopy(student) if path == "top k" else teacher
    terms: Terms = {"kl": (KL(), 1.0), "ce": (CrossEntropy(), 0.5)}
    terms = {"chunks": {**terms, "end": (FinalState(), 1.0)}, "autograd": {"kl": (_NoSlope(), 1.0)}}.get(path, terms)
    if path == "hidden states":
        terms = {"a": (HiddenMatch("cosine"), 1.0), "b": (HiddenMatch("normalized"), 1.0)}
    chunk = None if path == "whole logits" else 5
    module = DistillModule(student, teacher, terms, OptimSpec(), Record(4), separator=separator, chunk=chunk)
    if path == "top k":
        module.use_teacher_cache(top_rows(length))
    windows = torch.randint(1, VOCAB, (4, length), generator=torch.Generator().manual_seed(0))
    windows[0, ::2] = separator.token
    windows[1] = separator.token
    windows[2, length // 2] = separator.token
    logs: list[dict[str, Tensor]] = []
    module.log_dict = lambda values, **_: logs.append(dict(values))  # type: ignore[method-assign,assignment]
    module._trainer = SimpleNamespace(log_every_n_steps=1)  # type: ignore[assignment]
    optimizer = make_optimizer(module.optim)
    module.enter(Stage("heal", tokens=64))
    module.regroup(optimizer)
    found = []
    for size in (4, 2, 1):
        student.zero_grad()
        losses = []
        for index in torch.arange(4).split(size):
            batch = windows[index]
            given = {"input_ids": batch, "index": index.tolist(), "kept": with_successor(batch, separator)}
            before = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
            loss = module.training_step(given, 0) * (size / len(windows))
            loss.backward()
            trained = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
            assert all(gradient is not None and gradient.isfinite().all() for gradient in trained.values())
            if not len(given["kept"]):
                assert loss == 0
                assert all(torch.equal(trained[name], gradient) for name, gradient in before.items())
            losses.append(loss.detach())
        gradients = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        module.configure_gradient_clipping(optimizer)
        found.append((torch.stack(losses).sum(), gradients))
    (loss, gradient), *others = found
    assert (loss > 0) == (length > 1)
    for other, its in others:
        torch.testing.assert_close(other, loss, rtol=1e-9, atol=0)
        assert (its - gradient).norm() <= 1e-9 * gradient.norm()
    assert ("train/loss" in logs[0]) == (length > 1)
    for values in logs[1:]:
        assert values.keys() == logs[0].keys()
        for name in (name for name in values if name.startswith("train/") and name != "train/grad_norm"):
            torch.testing.assert_close(values[name], logs[0][name], rtol=1e-9, atol=0)


class _NoSlope(KL):
    """A divergence whose slope autograd finds."""

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        return super().__call__(student, teacher)

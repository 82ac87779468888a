"""The ways of `benchmarks.step`: the same distillation steps by other loops, other trainers and ours.

Each way makes `steps` optimizer steps in the process that it is called in and tells what came of it. Seconds run from
the end of one step to the end of the next, so that everything between steps counts: loaders, callbacks, logging.

    padded   one document per row, float32, whole logits and all hidden states, KL summed over all positions / 100 +
             MSE of two hidden states: the loop of ILD's authors (arXiv 2511.05085)
    plain    packed rows, bf16 autocast, whole logits, KL per token: what one writes first
    trl      GKDTrainer of TRL, lmbda=0, beta=0
    modelopt KDTrainer of NVIDIA ModelOpt
    liger    Liger's chunked JSD at beta 0 in the plain loop, on last hidden states
    ours     `python train.py`, its Trainer and callbacks included

and ours with one option turned: `selective` and `checkpointing` (run.gradient_checkpointing=selective, true), `compile`
(run.compile=true), `whole_logits` (chunk=null), `boundaries` (data.boundaries=true: another loss), `stock` (the process
runs with ISKD_ALLOCATOR=stock).
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import low
from benchmarks.step_setup import DEVICE, Outcome, Recorder, Setup, Task, configured, prepared
from iskd.models import Stack
from iskd.training import run


def kl_per_token(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL [B, T] of logits."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


# ---- loops by hand ---------------------------------------------------------------------------------------------------


def loop(student: nn.Module, batches: Tensor, lr: float, loss_of: Callable[[int, Tensor], Tensor]) -> Recorder:
    """Forward, backward, clip and step; `loss_of` gives the loss of a step on its ids [B, T]."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0, fused=True)
    found = Recorder()
    for step, batch in enumerate(batches):
        found.start(student)
        loss = loss_of(step, batch.to(DEVICE))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(loss.detach())
        found.batches.append(batch)
        found.end(student)
    return found


def padded_text(setup: Setup, task: Task) -> tuple[Tensor, Tensor]:
    """One document a row, cut at the length of a window: ids and mask, [steps, rows, length]."""
    tokenizer, count = setup.parts.teacher.tokenizer, setup.steps * task.rows
    texts = [text for text, _ in islice(setup.parts.data.source.documents(), count)]
    ids = torch.full((count, task.length), int(tokenizer.eos_token_id or 0))
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        found = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[: task.length])
        ids[row, : len(found)], mask[row, : len(found)] = found, 1
    return ids.view(setup.ids_NBT.shape), mask.view(setup.ids_NBT.shape)


def run_padded(task: Task, steps: int) -> Outcome:
    with prepared(task, steps) as setup:
        ids, mask = padded_text(setup, task)
        states = ((task.removed[0], task.removed[-1] + 1), (-1, -1))  # below the gap and above it; the last ones
        first: list[Tensor] = []

        def loss_of(step: int, batch: Tensor) -> Tensor:
            given = {"input_ids": batch, "attention_mask": mask[step].to(DEVICE)}
            ours = setup.student(**given, output_hidden_states=True)
            with torch.no_grad():
                theirs = setup.teacher(**given, output_hidden_states=True)
            kl = kl_per_token(ours.logits, theirs.logits)
            if not first:
                first.append((kl.detach() * given["attention_mask"]).sum() / given["attention_mask"].sum())
            return kl.sum() / 100 + sum(F.mse_loss(ours.hidden_states[a], theirs.hidden_states[b]) for a, b in states)

        found = loop(setup.student, ids, task.lr, loss_of)
        return found.outcome(tokens=mask.sum((1, 2)).tolist(), first_kl=float(first[0]))


def run_plain(task: Task, steps: int) -> Outcome:
    with prepared(task, steps) as setup:

        def loss_of(_: int, batch: Tensor) -> Tensor:
            with low(DEVICE, task.mixed):
                with torch.no_grad():
                    theirs = setup.teacher(batch).logits
                return kl_per_token(setup.student(batch).logits[:, :-1], theirs[:, :-1]).mean()

        return loop(setup.student, setup.ids_NBT, task.lr, loss_of).outcome()


def run_liger(task: Task, steps: int) -> Outcome:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=DEVICE.type == "cuda"
    )
    with prepared(task, steps) as setup:
        teacher, student = Stack(setup.teacher), Stack(setup.student)

        def loss_of(_: int, batch: Tensor) -> Tensor:
            with low(DEVICE, task.mixed):
                with torch.no_grad():
                    theirs = teacher.last_hidden(batch)[:, :-1].flatten(0, 1)
                ours = student.last_hidden(batch)[:, :-1].flatten(0, 1)
                return fused(ours, student.head[0], theirs, teacher.head[0], batch[:, 1:].flatten())

        return loop(setup.student, setup.ids_NBT, task.lr, loss_of).outcome()


# ---- trainers that build on that of transformers ---------------------------------------------------------------------


def through_trainer(make: Callable[[Setup, dict[str, Any], dict[str, Any]], Any], task: Task, steps: int) -> Outcome:
    """Run a trainer, watched by a callback and around its own loss.

    Args:
        make: the trainer, of the setup, the arguments of its config, and those of itself.
        task: see `TASKS`.
        steps: how many.
    """
    from datasets import Dataset
    from transformers import TrainerCallback

    found = Recorder()

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            found.start(setup.student)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.end(setup.student)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch.clone()}

    with prepared(task, steps) as setup, tempfile.TemporaryDirectory() as folder:
        settings = {
            **{
                "output_dir": folder,
                "max_steps": steps,
                "per_device_train_batch_size": task.rows,
                "learning_rate": task.lr,
            },
            **{"weight_decay": 0.0, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "save_strategy": "no"},
            **{"optim": "adamw_torch_fused", "bf16": task.mixed, "use_cpu": DEVICE.type == "cpu"},
            **{"train_sampling_strategy": "sequential", "gradient_checkpointing": False, "report_to": "none"},
            **{"logging_strategy": "no", "disable_tqdm": True},
        }
        rows = Dataset.from_dict({"input_ids": setup.ids_NBT.flatten(0, 1).tolist()})
        given = {"model": setup.student, "train_dataset": rows, "data_collator": collate, "callbacks": [Watch()]}
        trainer = make(setup, settings, given)
        own = trainer.compute_loss

        def watched(model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            result = own(model, inputs, *args, **kwargs)
            found.batches.append(inputs["input_ids"])
            found.losses.append((result[0] if isinstance(result, tuple) else result).detach().clone())
            return result

        trainer.compute_loss = watched
        trainer.train()
    return found.outcome()


def run_trl(task: Task, steps: int) -> Outcome:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def make(setup: Setup, settings: dict[str, Any], given: dict[str, Any]) -> Any:
        arguments = GKDConfig(**settings, lmbda=0.0, beta=0.0, temperature=1.0)
        tokenizer = setup.parts.teacher.tokenizer
        return GKDTrainer(**given, teacher_model=setup.teacher, args=arguments, processing_class=tokenizer)

    return through_trainer(make, task, steps)


def run_modelopt(task: Task, steps: int) -> Outcome:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    def make(setup: Setup, settings: dict[str, Any], given: dict[str, Any]) -> Any:
        return KDTrainer(**given, args=TrainingArguments(**settings), distill_args={"teacher_model": setup.teacher})

    return through_trainer(make, task, steps)


# ---- ours ------------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Our Trainer's steps; the loss is the one logged as train/loss."""

    def __init__(self, found: Recorder) -> None:
        self.found = found

    def on_train_batch_start(self, _: Any, module: Any, *__: Any) -> None:
        self.found.start(module.student)

    def on_train_batch_end(self, _: Any, module: Any, outputs: Any, batch: Any, ___: int) -> None:
        self.found.losses.append(outputs["loss"].detach().clone())
        self.found.batches.append(batch["input_ids"])
        self.found.end(module.student)


def run_ours(task: Task, steps: int, *options: str) -> Outcome:
    """The command line's own objects, options added: layers removed at once, then `steps` steps."""
    found = Recorder()
    with configured(task, steps, *options) as parts:
        parts.callbacks.append(Watch(found))
        result = run(parts)
        assert not set(task.removed) & set(result.record.layers)
        outcome = found.outcome()
        with (parts.run_dir / "metrics.csv").open() as file:
            outcome.before = sum(float(row.get("train/refit_seconds") or 0) for row in csv.DictReader(file))
    return outcome


OPTIONS = {
    "selective": ("run.gradient_checkpointing=selective",),
    "checkpointing": ("run.gradient_checkpointing=true",),
    "compile": ("run.compile=true",),
    "whole_logits": ("chunk=null",),
    "boundaries": ("data.boundaries=true",),
    "stock": (),
}
# of the process, where it is another than that of all ways; huge pages were asked for when this one started
ENVIRONMENTS = {"stock": {"ISKD_ALLOCATOR": "stock", "THP_MEM_ALLOC_ENABLE": "0"}}

COMPARED: dict[str, Callable[[Task, int], Outcome]] = {
    "padded": run_padded,
    "plain": run_plain,
    "trl": run_trl,
    "modelopt": run_modelopt,
    "liger": run_liger,
    "ours": run_ours,
}
WAYS = COMPARED | {
    name: lambda task, steps, options=options: run_ours(task, steps, *options) for name, options in OPTIONS.items()
}

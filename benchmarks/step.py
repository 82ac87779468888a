"""One distillation step of SmolLM2-135M, 30 -> 26 layers, 4 x 512 tokens: ours against other loops and trainers.

    python -m benchmarks.step --repeats 3

Every way runs alone in a fresh process, all with the same memory settings (`iskd.allocator`), one after the other
within each repeat; a figure is the median over the repeats. Same teacher, same student (layers 12-15 gone), same text
(docstrings of the standard library), forward KL, AdamW 1e-5 without weight decay, gradients clipped at 1, no activation
checkpointing. Speed counts the tokens that are no padding. KL: nats per token on the first batch before any step, the
parity between the ways.

    padded   one document per row, float32, whole logits and all hidden states, KL summed over all positions / 100 +
             MSE of two hidden states: the loop of ILD's authors
    plain    packed rows, bf16 autocast, whole logits, KL per token: what one writes first
    trl      GKDTrainer of TRL, lmbda=0, beta=0
    modelopt KDTrainer of NVIDIA ModelOpt
    liger    Liger's chunked JSD at beta 0 in the plain loop, on last hidden states
    ours     `python train.py`, its Trainer and callbacks included
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from iskd.allocator import tune

tune()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from iskd import surgery  # noqa: E402
from iskd.arch import Stack  # noqa: E402
from iskd.build import fast_bf16  # noqa: E402
from iskd.corpus import Docstrings  # noqa: E402
from iskd.plan import Record, Remove  # noqa: E402
from iskd.teachers import Loaded, TeacherSpec, load_teacher  # noqa: E402

WAYS = ("padded", "plain", "trl", "modelopt", "liger", "ours")
REMOVED = (12, 13, 14, 15)
ROWS, LENGTH, WARM_UP = 4, 512, 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Seconds = list[float]


def low() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda" or fast_bf16())


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def models() -> tuple[Loaded, PreTrainedModel]:
    teacher = load_teacher(TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2"))
    student = copy.deepcopy(teacher.model).train().requires_grad_(True)
    surgery.apply(student, Record(30), [Remove(layer) for layer in REMOVED])
    teacher.model.requires_grad_(False).eval()
    for model in (teacher.model, student):
        nn.Module.to(model, DEVICE)
    return teacher, student


def texts() -> list[str]:
    return [text for text, split in Docstrings().documents() if split is None or split == "train"]


def packed(tokenizer: Any, batches: int) -> Tensor:
    """Windows [batches * ROWS, LENGTH] of documents one after the other, with a separator."""
    ids: list[int] = []
    for text in texts():
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        if len(ids) >= batches * ROWS * LENGTH:
            break
    return torch.tensor(ids[: batches * ROWS * LENGTH]).view(-1, LENGTH)


def padded(tokenizer: Any, batches: int) -> tuple[Tensor, Tensor]:
    """One document a row, cut at LENGTH: ids and mask, [batches * ROWS, LENGTH]."""
    rows = [tokenizer(text).input_ids[:LENGTH] for text in texts()[: batches * ROWS]]
    ids = torch.full((len(rows), LENGTH), tokenizer.eos_token_id)
    mask = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
    for row, found in enumerate(rows):
        ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
    return ids, mask


def kl_per_token(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL [B, T] of logits."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def first_kl(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> float:
    """Forward KL of the first batch, a row at a time."""
    with low():
        rows = [kl_per_token(student(row[None]).logits, teacher(row[None]).logits) for row in ids.to(DEVICE)]
    return torch.cat(rows).mean().item()


def loop(student: nn.Module, steps: int, loss_of: Callable[[int], Tensor]) -> Seconds:
    """Forward, backward, clip and step by hand; `loss_of` is the loss of a step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    seconds = []
    for step in range(steps):
        start = clock()
        loss_of(step).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - start)
    return seconds


def run_padded(steps: int) -> dict[str, Any]:
    teacher, student = models()
    ids, mask = padded(teacher.tokenizer, steps)

    def loss_of(step: int) -> Tensor:
        at = slice(step * ROWS, (step + 1) * ROWS)
        batch = {"input_ids": ids[at].to(DEVICE), "attention_mask": mask[at].to(DEVICE)}
        ours = student(**batch, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher.model(**batch, output_hidden_states=True)
        kl = kl_per_token(ours.logits, theirs.logits).sum() / 100
        states = ((12, 16), (-1, -1))  # after the layer before the gap: the state after the gap; and the last
        return kl + sum(F.mse_loss(ours.hidden_states[a], theirs.hidden_states[b]) for a, b in states)

    kl = first_kl(student, teacher.model, ids[:1])
    seconds = loop(student, steps, loss_of)
    return {"seconds": seconds, "tokens": mask.view(steps, -1).sum(1).tolist(), "kl": kl}


def run_plain(steps: int) -> dict[str, Any]:
    teacher, student = models()
    ids = packed(teacher.tokenizer, steps)

    def loss_of(step: int) -> Tensor:
        batch = ids[step * ROWS : (step + 1) * ROWS].to(DEVICE)
        with low():
            with torch.no_grad():
                theirs = teacher.model(batch).logits
            return kl_per_token(student(batch).logits, theirs).mean()

    kl = first_kl(student, teacher.model, ids[:ROWS])
    return {"seconds": loop(student, steps, loss_of), "tokens": [ROWS * LENGTH] * steps, "kl": kl}


def run_liger(steps: int) -> dict[str, Any]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    teacher, student = models()
    ids = packed(teacher.tokenizer, steps)
    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=DEVICE.type == "cuda"
    )

    def loss_of(step: int) -> Tensor:
        batch = ids[step * ROWS : (step + 1) * ROWS].to(DEVICE)
        with low():
            with torch.no_grad():
                theirs = Stack(teacher.model).last_hidden(batch).flatten(0, 1)
            ours = Stack(student).last_hidden(batch).flatten(0, 1)
            heads = [Stack(model).head[0] for model in (student, teacher.model)]
            return fused(ours, heads[0], theirs, heads[1], batch.flatten())

    kl = first_kl(student, teacher.model, ids[:ROWS])
    return {"seconds": loop(student, steps, loss_of), "tokens": [ROWS * LENGTH] * steps, "kl": kl}


def trainer_arguments(folder: str, steps: int) -> dict[str, Any]:
    """Of transformers' Trainer, for the two trainers that build on it."""
    return {
        **{"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": ROWS, "learning_rate": 1e-5},
        **{"weight_decay": 0.0, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused"},
        **{"bf16": DEVICE.type == "cuda" or fast_bf16(), "use_cpu": DEVICE.type == "cpu", "save_strategy": "no"},
        **{"report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False},
    }


def through_trainer(make: Callable[[Loaded, PreTrainedModel, Any, Any, str], Any], steps: int) -> dict[str, Any]:
    """Time the steps of a trainer between two of its callbacks."""
    from datasets import Dataset
    from transformers import TrainerCallback

    teacher, student = models()
    ids = packed(teacher.tokenizer, steps)
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    starts: Seconds = []
    ends: Seconds = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            starts.append(clock())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock())

    def collate(found: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = torch.tensor([row["input_ids"] for row in found])
        return {"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch.clone()}

    kl = first_kl(student, teacher.model, ids[:ROWS])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(teacher, student, rows, collate, folder)
        trainer.add_callback(Timer())
        trainer.train()
    seconds = [end - start for start, end in zip(starts, ends, strict=True)]
    return {"seconds": seconds, "tokens": [ROWS * LENGTH] * steps, "kl": kl}


def run_trl(steps: int) -> dict[str, Any]:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def make(teacher: Loaded, student: PreTrainedModel, rows: Any, collate: Any, folder: str) -> Any:
        arguments = GKDConfig(**trainer_arguments(folder, steps), lmbda=0.0, beta=0.0, temperature=1.0)
        return GKDTrainer(
            model=student, teacher_model=teacher.model, args=arguments, train_dataset=rows, data_collator=collate,
            processing_class=teacher.tokenizer,
        )  # fmt: skip

    return through_trainer(make, steps)


def run_modelopt(steps: int) -> dict[str, Any]:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    def make(teacher: Loaded, student: PreTrainedModel, rows: Any, collate: Any, folder: str) -> Any:
        arguments = TrainingArguments(**trainer_arguments(folder, steps))
        distill = {"teacher_model": teacher.model}
        return KDTrainer(model=student, args=arguments, train_dataset=rows, data_collator=collate, distill_args=distill)

    return through_trainer(make, steps)


def run_ours(steps: int) -> dict[str, Any]:
    """The command line's own objects: layers removed at once, then `steps` steps."""
    from hydra import compose, initialize_config_dir
    from lightning.pytorch.callbacks import Callback

    from iskd import build
    from iskd.cli import CONF
    from iskd.run import run

    starts: Seconds = []
    ends: Seconds = []

    class Timer(Callback):
        def on_train_batch_start(self, *_: Any, **__: Any) -> None:
            starts.append(clock())

        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock())

    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(CONF, version_base="1.3"):
        config = compose(
            "config",
            [
                *(
                    "schedule=oneshot",
                    "edit=remove",
                    f"schedule.layers={list(REMOVED)}",
                    "loss=[kl]",
                    "data=docstrings",
                ),
                *(f"data.batch_size={ROWS}", f"data.seq_len={LENGTH}", f"schedule.tokens={steps * ROWS * LENGTH}"),
                *(
                    "schedule.lr=1e-5",
                    "optim.weight_decay=0.0",
                    "optim.warmup=0",
                    "optim.decay=constant",
                    "optim.clip=1.0",
                ),
                *("data.val_tokens=2048", "run.measure_before=false", "run.checkpoint_every=1000", "export=false"),
                *("trainer.progress=false", "name=benchmark"),
            ],
        )
        parts = build.parts(config, Path(folder) / "run")
        parts.callbacks.append(Timer())
        result = run(parts)
    kl = read_first_kl(parts.teacher)
    seconds = [end - start for start, end in zip(starts, ends, strict=True)]
    assert len(result.record.layers) == 30 - len(REMOVED)
    return {"seconds": seconds, "tokens": [ROWS * LENGTH] * steps, "kl": kl}


def read_first_kl(teacher: Loaded) -> float:
    """KL of the untrained student on the batch that the other ways begin with, by our loss."""
    from iskd.losses.chunked import chunked_vocabulary_loss
    from iskd.losses.kl import KL

    student = copy.deepcopy(teacher.model)
    surgery.apply(student, Record(30), [Remove(layer) for layer in REMOVED])
    for model in (teacher.model, student):
        nn.Module.to(model, DEVICE)
    ids = packed(teacher.tokenizer, 1).to(DEVICE)
    ours, theirs = Stack(student), Stack(teacher.model)
    with torch.no_grad(), low():
        total, _ = chunked_vocabulary_loss(
            {"kl": (KL(), 1.0)}, ours.last_hidden(ids), ours.head, theirs.last_hidden(ids), theirs.head, ids
        )
    return total.item()


def in_a_process(way: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.step", "--only", way, "--steps", str(steps)]
    environment = {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """A row per way: medians over the repeats, ratios within a repeat."""

    def rate(one: dict[str, Any]) -> float:
        return sum(one["tokens"][WARM_UP:]) / sum(one["seconds"][WARM_UP:])

    absolute = DEVICE.type == "cuda"
    shown = " tokens/s |" if absolute else ""
    yield f"| way | no padding % | ours is faster by | peak GiB | ours / this | KL at the start |{shown}"
    yield "|---|---|---|---|---|---|" + ("---|" if absolute else "")
    mine = statistics.median(one["gib"] for one in found["ours"])
    for way, runs in found.items():
        ratios = [rate(ours) / rate(one) for ours, one in zip(found["ours"], runs, strict=True)]
        gib = statistics.median(one["gib"] for one in runs)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        shown = f" {statistics.median(map(rate, runs)):.0f} |" if absolute else ""
        useful = 100 * statistics.mean(runs[0]["tokens"]) / (ROWS * LENGTH)
        yield f"| {way} | {useful:.0f} | {spread} | {gib:.2f} | {mine / gib:.2f} | {runs[0]['kl']:.4f} |{shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=WARM_UP + 4)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--only", choices=WAYS, help="one way in this process; prints its figures")
    arguments = parser.parse_args()
    if arguments.only:
        torch.manual_seed(0)
        found = globals()[f"run_{arguments.only}"](arguments.steps)
        print(json.dumps({**found, "gib": peak_gib()}))
        return
    ways = [*(way for way in arguments.ways if way != "ours"), "ours"]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        for way in ways:
            runs[way].append(in_a_process(way, arguments.steps))
            print(f"repeat {repeat + 1}: {way} {runs[way][-1]['seconds']}", file=sys.stderr, flush=True)
    print(f"{DEVICE.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.repeats} repeats\n")
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()

"""What the benchmarks share: models of a given size, ways timed in turn, ratios, and what a number was measured on."""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from iskd.losses.kl import KL
from iskd.models import surgery
from iskd.plan import Record, Remove
from iskd.system import machine
from iskd.system.machine import clock
from iskd.system.precision import precision
from iskd.training.step import DistillModule, OptimSpec

T = TypeVar("T")
_PACKAGES = ("lightning", "accelerate", "trl", "nvidia-modelopt", "liger-kernel", "triton")


@dataclass(frozen=True)
class Taken:
    """Seconds of one piece of work, by the clock and of the processor."""

    wall: float
    cpu: float


def timed(device: torch.device, work: Callable[[], T]) -> tuple[Taken, T]:
    """How long a call takes, the device's work included, and what it returns."""
    wall, cpu = clock(device), time.process_time()
    found = work()
    return Taken(clock(device) - wall, time.process_time() - cpu), found


def rotated(names: Sequence[str], repeat: int) -> list[str]:
    """The order of a repeat: each starts one name later, so that none always runs first."""
    start = repeat % len(names)
    return [*names[start:], *names[:start]]


def in_turns(ways: Mapping[str, Callable[[int], T]], repeats: int) -> dict[str, list[T]]:
    """What every way returns in every repeat, its number given; all ways run once within each.

    A repeat more is run: number 0 warms up and is left out.
    """
    found: dict[str, list[T]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name in rotated(list(ways), repeat):
            result = ways[name](repeat)
            if repeat:
                found[name].append(result)
    return found


def spread(base: Sequence[float], own: Sequence[float], digits: int = 2) -> str:
    """Median of base / own within a repeat, and the least and the greatest."""
    ratios = [theirs / mine for theirs, mine in zip(base, own, strict=True)]
    low, middle, high = (f"{f(ratios):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def fast_bf16(device: torch.device) -> bool:
    """Whether training runs under bf16 autocast there by default."""
    return precision("auto", "cpu" if device.type == "cpu" else "gpu") == "bf16-mixed"


def low(device: torch.device, wanted: bool | None = None) -> torch.autocast:
    """Autocast to bf16; None = where training has it by default."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device) if wanted is None else wanted)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had: handed out by torch on CUDA, resident on a CPU.

    The kernel's mark (VmHWM) starts anew with a program; that of getrusage starts at what its parent had.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def setting(device: torch.device) -> str:
    """The machine, its settings and the versions, for the line above a table."""
    facts = machine.describe(device)
    versions = {name: facts[name] for name in ("python", "torch", "transformers")}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, {facts['allocator']} allocator; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


# ---- random models of a given size -----------------------------------------------------------------------------------


def size_options(description: str | None) -> argparse.ArgumentParser:
    """Options of a benchmark on a random model; the defaults are SmolLM2-135M's sizes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--removed", type=int, default=4, help="layers that the student lacks")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=4, help="windows")
    parser.add_argument("--tokens", type=int, default=512, help="per window")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="autocast; by default where training has it"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def sizes(options: argparse.Namespace, device: torch.device) -> str:
    """What was measured, in words."""
    mixed = fast_bf16(device) if options.bf16 is None else options.bf16
    return (
        f"{options.layers} layers of width {options.width}, {options.removed} removed, vocabulary "
        f"{options.vocabulary}, {options.batch} x {options.tokens} tokens, "
        f"{'bf16 autocast' if mixed else 'float32'}, median of {options.repeats} (least-greatest)"
    )


def random_teacher(layers: int, width: int, vocabulary: int, context: int) -> PreTrainedModel:
    """A Llama in SmolLM2-135M's proportions: heads of 64, a third of them for keys, MLP 8/3 wide."""
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def distilled(options: argparse.Namespace, first: int, device: torch.device) -> DistillModule:
    """A random teacher and a student that lacks the layers from `first` on, under KL, on the device."""
    teacher = random_teacher(options.layers, options.width, options.vocabulary, options.tokens)
    student = copy.deepcopy(teacher)
    removed = [Remove(first + i) for i in range(options.removed)]
    record = surgery.apply(student, Record(options.layers), removed)
    module = DistillModule(student, teacher, {"kl": (KL(), 1.0)}, OptimSpec(), record).to(device)
    module.place_teacher()
    return module


def backward(module: DistillModule, ids: Tensor, mixed: bool | None, *cached: Mapping[str, Tensor]) -> Tensor:
    """The loss of windows [B, T], its gradients in place."""
    with low(ids.device, mixed):
        loss = module.step(ids, *cached).loss
    loss.backward()
    return loss.detach()


def update(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer step."""
    optimizer.step()
    optimizer.zero_grad()

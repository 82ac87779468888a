"""The step with a frozen prefix, shared with the teacher and not: times of whole steps, interleaved.

A random model of SmolLM2-135M's sizes is the teacher; the student lacks the layers right above the prefix, its upper
blocks train under AdamW, embedding, tied head and prefix are frozen. Every repeat makes one step of each way on the
same windows; a ratio is the median over the repeats of the ratio within one. Before that one step of each is compared:
gradients must be equal bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

from iskd.allocator import tune

tuned = tune()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel  # noqa: E402

from iskd import surgery  # noqa: E402
from iskd.arch import Stack  # noqa: E402
from iskd.losses.kl import KL  # noqa: E402
from iskd.module import DistillModule, clock  # noqa: E402
from iskd.optim import OptimSpec, make_optimizer  # noqa: E402
from iskd.plan import Record, Remove  # noqa: E402

WAYS = {"apart": False, "shared": True}


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


def distilled(teacher: PreTrainedModel, frozen: int, removed: int, device: torch.device) -> DistillModule:
    """Teacher and student on the device; the student's blocks from `frozen` on train."""
    student, record = copy.deepcopy(teacher), Record(int(teacher.config.num_hidden_layers))
    record = surgery.apply(student, record, [Remove(frozen + i) for i in range(removed)])
    student.requires_grad_(False)
    for block in list(Stack(student).layers)[frozen:]:
        block.requires_grad_(True)
    module = DistillModule(student, teacher, {"kl": (KL(), 1.0)}, OptimSpec(), record)
    return module.to(device)


def optimizer_of(module: DistillModule) -> torch.optim.Optimizer:
    optimizer = make_optimizer(module.optim)
    optimizer.param_groups[0]["params"] = [p for p in module.student.parameters() if p.requires_grad]
    optimizer.param_groups[0]["lr"] = 1e-5
    return optimizer


def backward(module: DistillModule, ids: Tensor, mixed: bool) -> None:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed):
        loss = module.step(ids).loss
    loss.backward()


def gradients(module: DistillModule, ids: Tensor, mixed: bool) -> list[Tensor]:
    backward(module, ids, mixed)
    found = [p.grad for p in module.student.parameters() if p.grad is not None]
    for p in module.student.parameters():
        p.grad = None
    return found


def step(module: DistillModule, optimizer: torch.optim.Optimizer, ids: Tensor, mixed: bool) -> tuple[float, float]:
    """Wall and CPU seconds of one step."""
    wall, cpu = clock(ids.device), time.process_time()
    backward(module, ids, mixed)
    optimizer.step()
    optimizer.zero_grad()
    return clock(ids.device) - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--frozen", type=int, default=20, help="blocks of the prefix")
    parser.add_argument("--removed", type=int, default=4, help="layers right above it that the student lacks")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=4, help="windows")
    parser.add_argument("--tokens", type=int, default=512, help="per window")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    teacher = random_teacher(options.layers, options.width, options.vocabulary, options.tokens).to(device)
    module = distilled(teacher, options.frozen, options.removed, device)
    module.place_teacher()
    optimizer = optimizer_of(module)
    generator = torch.Generator().manual_seed(0)

    def windows() -> Tensor:
        shape = (options.batch, options.tokens)
        return torch.randint(0, options.vocabulary, shape, generator=generator).to(device)

    ids, found = windows(), []
    for module.share_prefix in WAYS.values():
        found.append(gradients(module, ids, options.bf16))
    equal = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for repeat in range(options.repeats + 1):
        ids = windows()
        for name, module.share_prefix in WAYS.items():
            taken = step(module, optimizer, ids, options.bf16)
            if repeat:  # the first warms up
                seconds[name].append(taken)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} thread(s), "
        f"{'bf16 autocast' if options.bf16 else 'float32'}, {'tuned' if tuned else 'stock'} allocator, "
        f"{options.layers} layers of width {options.width}, {options.removed} removed, first {options.frozen} frozen, "
        f"{options.batch} x {options.tokens} tokens, median of {options.repeats}"
    )
    print(f"gradients equal bit for bit: {equal}")
    print("\n| way | seconds per step | CPU seconds |\n|---|---|---|")
    for name, pairs in seconds.items():
        wall, cpu = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        print(f"| {name} | {wall:.3f} | {cpu:.3f} |")
    for kind, i in (("wall", 0), ("CPU", 1)):
        pairs = zip(seconds["apart"], seconds["shared"], strict=True)
        print(f"\nshared is {statistics.median(a[i] / b[i] for a, b in pairs):.2f} times faster ({kind} time)")


if __name__ == "__main__":
    main()

"""FLOPs against formulas, and a profile that adds up and leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.losses.ce import CrossEntropy
from iskd.losses.kl import KL
from iskd.models import Stack
from iskd.plan import Record, Stage
from iskd.teacher import TeacherCache
from iskd.training.profile import step_profile
from iskd.training.profile.operators import group_of
from iskd.training.profile.profile import SPANS, profile_table, write_profile
from iskd.training.step import DistillModule, OptimSpec, flops, make_optimizer, passes, regroup
from iskd.training.step import module as module_file
from iskd.training.step.block_runner import BlockRunner
from tests.factories import digest, tiny, windows

D, LAYERS, MLP, HEADS, WIDTH, KV, VOCAB = 48, 4, 96, 6, 8, 3, 101
MATRICES = LAYERS * (2 * D * D + 2 * D * KV * WIDTH + 3 * D * MLP)  # weights of the trunk's linear maps
CPU = torch.device("cpu")


def module_of(dropout: float = 0.0, layers: int = LAYERS) -> DistillModule:
    teacher = tiny("llama", layers=layers, dropout=dropout)
    student = copy.deepcopy(teacher)
    terms = {"kl": (KL(), 1.0), "ce": (CrossEntropy(), 0.1)}
    return DistillModule(student, teacher, terms, OptimSpec(), Record(layers), chunk=7)


def optimizer_of(module: DistillModule) -> torch.optim.AdamW:
    optimizer = make_optimizer(module.optim)
    regroup(optimizer, module.student, module.record, Stage("start", lr=1e-3), {})
    return optimizer


def attention(b: int, t: int, products: int, *, causal: bool = True) -> int:
    return 2 * b * HEADS * (t * (t + 1) // 2 if causal else t * t) * products * WIDTH


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_cpu_is_counted_forward_and_backward(causal: bool) -> None:
    q, k, v = (torch.randn(2, HEADS, 16, WIDTH, requires_grad=True) for _ in range(3))

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()

    assert flops.count_flops(both) == attention(2, 16, 2 + 5, causal=causal)


def test_a_linear_map_counts_two_flops_per_weight_and_token_and_three_times_that_in_training() -> None:
    linear, x = nn.Linear(5, 7), torch.randn(3, 4, 5, requires_grad=True)
    assert flops.count_flops(lambda: linear(x)) == 2 * 12 * 35
    assert flops.count_flops(lambda: linear(x).sum().backward()) == 3 * 2 * 12 * 35


@torch.no_grad()
def test_a_trunk_counts_its_matrices_and_its_attention() -> None:
    ids = windows(2, 16)
    found = flops.count_flops(lambda: Stack(tiny("llama")).last_hidden(ids))
    assert found == 2 * ids.numel() * MATRICES + LAYERS * attention(2, 16, 2)


def test_a_step_counts_teacher_student_and_the_chunked_loss() -> None:
    """The loss: logits of both, and the gradients of the hidden states and of the head, 2 n V D each."""
    b, t = 3, 16
    teacher = 2 * b * t * MATRICES + LAYERS * attention(b, t, 2)
    student = 3 * 2 * b * t * MATRICES + LAYERS * attention(b, t, 2 + 5)
    head = 4 * 2 * b * (t - 1) * VOCAB * D
    assert flops.step_flops(module_of(), windows(b, t)) == teacher + student + head


def test_the_flops_of_a_step_grow_with_the_windows_and_shrink_with_the_student() -> None:
    module = module_of()
    one, three = (flops.step_flops(module, windows(n, 16)) for n in (1, 3))
    assert three == 3 * one
    assert flops.step_flops(module_of(layers=2), windows(1, 16)) < one


def test_blocks_that_are_run_twice_count_once_in_a_step() -> None:
    """Model FLOPs, as MFU has them; a profile counts what runs and says that it does."""
    module = module_of()
    expected = flops.step_flops(module, windows(2, 16))
    module.blocks = BlockRunner(recompute=True)
    assert flops.step_flops(module, windows(2, 16)) == expected
    assert module.blocks.recompute
    profile = step_profile.profile_step(module, {"input_ids": windows(2, 16)}, optimizer_of(module), steps=1)
    assert profile.recomputed
    assert sum(profile.flops.values()) > expected


def test_counting_leaves_weights_gradients_and_random_numbers() -> None:
    module = module_of(dropout=0.3)
    first = next(module.student.parameters())
    first.grad = torch.ones_like(first)
    before, rng, attributes = digest(module.student), torch.get_rng_state(), dict(vars(module))
    flops.step_flops(module, windows(1, 16))
    assert digest(module.student) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert vars(module) == attributes
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(module.student.parameters())[1:])


def test_the_meter_of_a_stage_is_flops_by_time_and_peak() -> None:
    module, meter = module_of(), flops.MfuMeter(CPU, peak=1e9)
    found = meter.stage(module, {"input_ids": windows(3, 16)}, tokens_per_second=100.0)
    assert found["train/flops_per_token"] == flops.step_flops(module, windows(1, 16)) / 16
    assert found["train/mfu"] == pytest.approx(found["train/flops_per_token"] * 100.0 / 1e9)
    assert meter.dtype == torch.float32


def test_a_step_that_reads_the_cache_is_counted_without_the_teacher(tmp_path: Path) -> None:
    module, batch, meter = module_of(), {"input_ids": windows(3, 16), "index": [2, 0, 1]}, flops.MfuMeter(CPU, peak=1e9)
    live = meter.stage(module, batch, 1.0)["train/flops_per_token"]
    module.use_teacher_cache(TeacherCache.open(module.teacher, windows(3, 16).numpy(), tmp_path).fill())
    cached = meter.stage(module, batch, 1.0)["train/flops_per_token"]
    assert 16 * (live - cached) == 2 * 16 * MATRICES + LAYERS * attention(1, 16, 2)


def test_the_peak_is_positive_draws_nothing_and_names_bad_values() -> None:
    rng = torch.get_rng_state()
    assert flops.matmul_peak(CPU, torch.float32, shapes=[(64, 64, 64)], repeats=3) > 0
    assert torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(ValueError, match="needs a shape and a repeat"):
        flops.matmul_peak(CPU, torch.float32, shapes=[])
    with pytest.raises(ValueError, match="above 0"):
        flops.mfu(1.0, 0.0, 1.0)


@pytest.mark.usefixtures("_small_peak")
def test_a_profile_adds_up_and_leaves_everything_as_found(tmp_path: Path) -> None:
    module = module_of(dropout=0.3)
    optimizer = optimizer_of(module)
    batch = {"input_ids": windows(2, 32)}
    module.step(batch["input_ids"]).loss.backward()
    optimizer.step()  # moments that a profile must not touch
    gradients = {name: p.grad.clone() for name, p in module.student.named_parameters() if p.grad is not None}
    moments = copy.deepcopy(optimizer.state_dict())
    before, rng, attributes = digest(module.student), torch.get_rng_state(), dict(vars(module))

    steps: list[int] = []
    profile = step_profile.profile_step(
        module, batch, optimizer, steps=3, accumulate=2, operators=True, progress=lambda _, n, total: steps.append(n)
    )

    assert digest(module.student) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert vars(module) == attributes
    assert all(torch.equal(p.grad, gradients[name]) for name, p in module.student.named_parameters())  # type: ignore[arg-type]
    assert same(optimizer.state_dict(), moments)

    assert steps == list(range(1, len(steps) + 1))
    assert set(profile.seconds) == set(SPANS) - {"alignment"}
    assert all(seconds >= 0 for seconds in profile.seconds.values())
    assert profile.step_seconds > 0
    assert profile.tokens == 2 * 64
    assert sum(profile.flops.values()) == 2 * flops.step_flops(module, batch["input_ids"])
    assert set(profile.flops) == {"teacher", "student", "loss", "backward"}  # no product outside the named spans
    assert profile.memory_bytes > 0
    assert {"matmul", "element-wise", "copies and casts"} <= set(profile.operators)
    assert write_profile(tmp_path, profile).is_file()
    console = Console(record=True, width=140)
    console.print(profile_table(profile))
    assert "backward of the trunk" in console.export_text()


@pytest.mark.usefixtures("_small_peak")
def test_time_goes_to_the_span_that_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only chosen functions move: the spans are exact, and add up to the step without timers."""
    module, now = module_of(), [0.0]
    optimizer = optimizer_of(module)

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            of_teacher = bool(args) and getattr(args[0], "model", None) is module.teacher
            now[0] += 3.0 if of_teacher else seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(step_profile, "clock", lambda _: now[0])
    monkeypatch.setattr(passes, "read", taking(5.0, passes.read))
    monkeypatch.setattr(module_file, "total_loss", taking(7.0, module_file.total_loss))
    monkeypatch.setattr(optimizer, "step", taking(11.0, optimizer.step))
    monkeypatch.setattr(module, "training_step", taking(13.0, module.training_step))
    profile = step_profile.profile_step(module, {"input_ids": windows(1, 8)}, optimizer, steps=2, accumulate=2)
    expected = {"teacher": 6.0, "student": 10.0, "loss": 14.0, "optimizer": 11.0, "rest": 26.0}
    assert {name: seconds for name, seconds in profile.seconds.items() if seconds} == expected
    assert profile.watched_seconds == profile.step_seconds == 67.0
    assert profile.tokens_per_second == pytest.approx(16 / 67)


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(("owner", "lost"), [(passes, "student, teacher"), (module_file, "loss")])
def test_work_that_opens_no_span_is_an_error_and_no_zero(
    owner: object, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of()
    optimizer = optimizer_of(module)
    rates = [group["lr"] for group in optimizer.param_groups]
    monkeypatch.setattr(owner, "span", lambda _: nullcontext())
    with pytest.raises(RuntimeError, match=rf"no span {lost} was opened in a profiled step, only loader.*; open span"):
        step_profile.profile_step(module, {"input_ids": windows(1, 8)}, optimizer, steps=1)
    assert [group["lr"] for group in optimizer.param_groups] == rates


def test_the_spans_of_a_step_are_those_that_its_stage_asks_for(tmp_path: Path) -> None:
    """No teacher where no term uses it or a cache speaks for it, and layers in its place where they are aligned."""

    def spans(module: DistillModule) -> set[str]:
        return {str(name) for name in step_profile._expected(module)} - {"loader", "backward", "clipping", "optimizer"}

    module = module_of()
    assert spans(module) == {"teacher", "student", "loss"}
    module.use_teacher_cache(TeacherCache.open(module.teacher, windows(1, 8).numpy(), tmp_path).fill())
    assert spans(module) == {"student", "loss"}
    module = module_of()
    module.terms = {"ce": (CrossEntropy(), 1.0), "kl": (KL(), 0.0)}
    assert spans(module) == {"student", "loss"}
    module.enter(Stage("align", objective="hidden"))
    assert spans(module) == {"alignment"}


def test_a_profile_of_no_step_is_refused() -> None:
    module = module_of()
    with pytest.raises(ValueError, match="at least one step"):
        step_profile.profile_step(module, {"input_ids": windows(1, 8)}, optimizer_of(module), steps=0)


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        ("aten::addmm", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "SDPA"),
        ("aten::copy_", "copies and casts"),
        ("aten::mul", "element-wise"),
        ("autograd::engine::evaluate_function: MulBackward0", "other"),
    ],
)
def test_operators_are_grouped_by_name(operator: str, group: str) -> None:
    assert group_of(operator) == group

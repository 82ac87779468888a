"""FLOPs of a step, counted as it runs, and their share of the machine's matrix peak, measured beside it.

    MFU = FLOPs of the step / (seconds of the step x FLOP/s of the fastest matmul)             (arXiv 2204.02311, B)

Counted is every matrix product that really runs, forward and backward: of the trunk, of attention, and of the chunked
loss, which forms its gradients in the forward pass. A forward pass that gradient checkpointing runs again counts once,
as the definition has it (`iskd profile` counts what runs, and says so). Element-wise work, norms and the optimizer
count nothing, as usual.

torch's counter does not know products that are added in place, as those of the head's gradient are, nor the CPU's
flash attention, neither forward nor backward, and counts a causal attention as if it looked at the future too. All is
put right here by formula; attention, for B sequences, H heads, T tokens, widths K and V:

    forward    2 B H pairs (K + V)          scores, weighted values
    backward   2 B H pairs (3 K + 2 V)      scores again, and the gradients of weights, values, queries, keys
    pairs      T (T + 1) / 2 under a causal kernel, T T' otherwise: a mask given as a tensor saves no work
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from iskd.system.machine import clock
from iskd.system.precision import ForwardContext
from iskd.training.step.module import DistillModule

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
# products over the width of the keys, and over that of the values
_PRODUCTS = {"": (1, 1), "_backward": (3, 2)}
# rows, inner size, columns; the last CPU shape is that of a small model's MLP, often the fastest there
_SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 576, 1536)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192)),
}
_IN_A_ROW = {"cuda": 10}  # launches timed together, so that the wait for the device does not count
_FLA = "ISKD_FLA"


@dataclass(frozen=True)
class _Attention:
    """FLOPs of one attention operator, read off its arguments by name."""

    names: tuple[str, ...]
    products: tuple[int, int]
    _get_raw: ClassVar[bool] = True  # what tells the counter to pass tensors and not their shapes

    def __call__(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        query, key, value = (given[name] for name in ("query", "key", "value"))
        queries, keys = query.shape[-2], key.shape[-2]
        pairs = queries * keys
        if given.get("is_causal", False):
            short = min(queries, keys)
            pairs = short * (short + 1) // 2 + (queries - short) * keys
        over_keys, over_values = self.products
        width = over_keys * query.shape[-1] + over_values * value.shape[-1]
        return 2 * int(query.shape[:-2].numel()) * pairs * width


def _added_in_place(_: Any, a_shape: Sequence[int], b_shape: Sequence[int], *__: Any, **___: Any) -> int:
    """FLOPs of `x += a @ b`."""
    return 2 * math.prod(a_shape) * b_shape[-1]


def counter() -> FlopCounterMode:
    """A FLOP counter, to be entered, that also knows the operators that torch's own one does not."""
    formulas: dict[Any, Any] = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), _added_in_place)
    for name in _ATTENTION:
        for suffix, products in _PRODUCTS.items():
            operator = getattr(torch.ops.aten, name + suffix, None)
            if operator is not None:
                names = tuple(argument.name for argument in operator.default._schema.arguments)
                formulas[operator] = _Attention(names, products)
    return FlopCounterMode(display=False, custom_mapping=formulas)


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products in one call of `work`."""
    with counter() as counted:
        work()
    return int(counted.get_total_flops())


def step_flops(
    module: DistillModule,
    input_ids: Tensor,
    forward_context: ForwardContext = nullcontext,
    *,
    cached: Mapping[str, Tensor] | None = None,
) -> int:
    """FLOPs of one training step on windows [B, T], forward and backward; they grow linearly in B.

    Without those of recomputed blocks. Leaves weights, gradients and random numbers as they were. In shards it is a
    collective: every rank calls it.

    Args:
        module: teacher, student and stage.
        input_ids: the windows, on the module's device.
        forward_context: the precision under which training runs.
        cached: what a teacher cache holds about the windows; None = the teacher is run.
    """

    def step() -> None:
        with forward_context():
            loss = module.step(input_ids, cached).loss
        loss.backward()

    with as_found(module), torch.enable_grad(), module.plain_blocks(), countable(module):
        return count_flops(step)


@contextmanager
def countable(module: DistillModule) -> Iterator[None]:
    """Keep work where the counter sees it: no kernels of fla, no compiled blocks; the same maths in plain torch."""
    before = os.environ.get(_FLA)
    modules = [*module.student.modules(), *module.teacher.modules()]
    compiled = any(hasattr(inner, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) for inner in modules)
    compiled |= module.blocks.backend is not None
    os.environ[_FLA] = "0"
    try:
        # only where needed: it imports the compiler
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        if before is None:
            del os.environ[_FLA]
        else:
            os.environ[_FLA] = before


@contextmanager
def as_found(module: DistillModule) -> Iterator[None]:
    """Give back the gradients, the random numbers and the module's own attributes as they were."""
    kept = dict(vars(module))
    gradients = [(parameter, parameter.grad) for parameter in module.student.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    devices = [module.device] if module.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        vars(module).clear()
        vars(module).update(kept)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype that matrix products have now: autocast's where it is active, else float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


@torch.no_grad()
def matmul_peak(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    repeats: int = 7,
    seconds: float = 1.0,
) -> float:
    """FLOP/s of the fastest of a few matmuls, each at its best; the process's random numbers stay as they are.

    Args:
        device: where.
        dtype: in which precision.
        shapes: rows, inner size and columns; None = some that are large and fast.
        repeats: of each shape.
        seconds: per shape, after which the repeats end early.

    Raises:
        ValueError: there is no shape or no repeat.
    """
    shapes = _SHAPES.get(device.type, _SHAPES["cpu"]) if shapes is None else shapes
    if not shapes or repeats < 1:
        raise ValueError(f"matmul_peak needs a shape and a repeat, got shapes={shapes} and repeats={repeats}")
    generator, best, in_a_row = torch.Generator(device).manual_seed(0), 0.0, _IN_A_ROW.get(device.type, 1)
    with torch.autocast(device.type, enabled=False):
        for rows, inner, columns in shapes:
            # the weight of a linear map is stored [out, in]
            x = torch.randn(rows, inner, generator=generator, device=device).to(dtype)
            weight = torch.randn(columns, inner, generator=generator, device=device).to(dtype)
            y = torch.empty(rows, columns, dtype=dtype, device=device)
            torch.mm(x, weight.T, out=y)
            since = now = clock(device)
            for _ in range(repeats):
                start = now
                for _ in range(in_a_row):
                    torch.mm(x, weight.T, out=y)
                now = clock(device)
                best = max(best, 2.0 * rows * inner * columns * in_a_row / max(now - start, 1e-9))
                if now - since > seconds:
                    break
    return best


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Share of the matrix peak (FLOP/s) that `flops` in `seconds` are; about 1 at most."""
    if seconds <= 0 or peak <= 0:
        raise ValueError(f"a share of the peak needs a time and a peak above 0, got {seconds} s and {peak} FLOP/s")
    return flops / (seconds * peak)


class MfuMeter:
    """Model FLOPs utilisation of the stages of a run, a metric for the end of each.

    Made once at the start of a run, when it measures the peak; a stage then costs one window, forward and backward.

    Args:
        device: of the module.
        forward_context: the precision under which training runs.
        devices: how many processes, each with a device like this one, the tokens per second are of.
        peak: FLOP/s; None = measured now.
    """

    def __init__(
        self,
        device: torch.device,
        forward_context: ForwardContext = nullcontext,
        *,
        devices: int = 1,
        peak: float | None = None,
    ) -> None:
        self.forward_context, self.devices = forward_context, devices
        with forward_context():
            self.dtype = matmul_dtype(device)
        self.peak = matmul_peak(device, self.dtype) if peak is None else peak

    def stage(self, module: DistillModule, batch: Mapping[str, Any], tokens_per_second: float) -> dict[str, float]:
        """`train/mfu` and `train/flops_per_token` of the stage that the module is in; changes no number of the run.

        Args:
            module: before its adapters are merged, if the stage trained some.
            batch: a micro-batch of the stage, from the loader or as trained on; one window of it is used.
            tokens_per_second: of the stage, over all processes.
        """
        first = module.transfer_batch_to_device(_first(batch), module.device, 0)
        window = first["input_ids"]
        flops = step_flops(module, window, self.forward_context, cached=module.cached(first))
        per_token = flops / window.numel()
        share = mfu(per_token * tokens_per_second, 1.0, self.peak * self.devices)
        return {"train/mfu": share, "train/flops_per_token": per_token}


def _first(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first window of a batch, with its number where the loader gives one."""
    return {name: value[:1] for name, value in batch.items()}

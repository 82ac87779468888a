"""Warm start: compact blocks fitted to the blocks they replace, before the first training step.

Teacher and student are walked through the calibration windows block by block, so that each compact block is fitted on
the student's own stream (which already went through the compact blocks below it) towards the teacher's stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.blocks.base import FitData, fit_error
from iskd.models import Stack
from iskd.models.capture import Trace, states_after
from iskd.plan import Edit, Record, Replace


@dataclass(frozen=True)
class Fitted:
    """Relative squared error of one compact block's output before and after its fit (1 = as large as the target)."""

    layer: int
    before: float
    after: float

    def __str__(self) -> str:
        return f"block {self.layer} fitted: relative squared error {self.before:.4f} -> {self.after:.4f}"


@torch.no_grad()
def warm_start(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    old_blocks: dict[int, nn.Module],
    record: Record,
    edits: Iterable[Edit],
    batches: Sequence[Tensor],
) -> list[Fitted]:
    """Fit the compact blocks that `edits` put into `student`.

    Args:
        student: the model after the edits.
        teacher: the frozen original.
        old_blocks: the replaced blocks by layer, as they were in the student.
        record: the student's record (after the edits).
        edits: this stage's edits; only replacements by blocks with a `fit` are touched.
        batches: calibration windows, each [B, T].

    Returns:
        One `Fitted` per fitted block, in stack order.
    """
    fits = {e.layer: e for e in edits if isinstance(e, Replace) and hasattr(e.block.resolve(), "fit")}
    if not fits or not batches:
        return []
    models = (student, teacher, *old_blocks.values())
    modes = [(module, module.training) for model in models for module in model.modules()]
    cached = torch.is_autocast_cache_enabled()
    # autocast keeps low-precision copies of weights and does not see that a fit has changed the originals
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        for model in models:
            model.eval()  # dropout would make fits noisy and draw from the run's random numbers
        return _walk(Stack(student), Stack(teacher), old_blocks, record, fits, batches)
    finally:
        torch.set_autocast_cache_enabled(cached)
        for module, mode in modes:
            module.training = mode


def _walk(
    student: Stack,
    teacher: Stack,
    old_blocks: dict[int, nn.Module],
    record: Record,
    fits: dict[int, Replace],
    batches: Sequence[Tensor],
) -> list[Fitted]:
    device = next(student.model.parameters()).device
    positions = [record.layers.index(layer) for layer in fits]
    batches = [batch.to(device) for batch in batches]
    traces = [Trace(student, batch, min(positions), max(positions)) for batch in batches]
    wanted = {record.state_after(layer) for layer in fits}
    targets = [states_after(teacher, range(record.num_layers), wanted, batch) for batch in batches]
    streams = [trace.input for trace in traces]
    done: list[Fitted] = []
    for position in range(min(positions), max(positions) + 1):
        layer, block = record.layers[position], student.layers[position]

        def run(module: nn.Module, h_BTD: Tensor, index: int, position: int = position) -> Tensor:
            return traces[index].run(position, module, h_BTD)

        if layer in fits:
            goal = [target[record.state_after(layer)].float() for target in targets]
            data = FitData(streams, goal, run, student)
            before = fit_error(block, data)
            spec = fits[layer].block
            spec.resolve().fit(block, old_blocks[layer], data, **spec.kwargs)  # type: ignore[attr-defined]
            done.append(Fitted(layer, before, fit_error(block, data)))
        streams = [run(block, stream, index) for index, stream in enumerate(streams)]
    return done

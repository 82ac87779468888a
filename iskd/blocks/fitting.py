"""Warm start: compact blocks fitted to the blocks they replace, and pairs merged, before the first training step.

Teacher and student are walked through the calibration windows block by block, so that each compact block is fitted on
the student's own stream (which already went through the compact blocks below it) towards the teacher's stream, and
towards what the teacher's block gives on the student's (`iskd.blocks.regression`). Text that no fit has seen says how
far each goes: the stream of the text that was fitted to looks better, block after block, than that of any other text.
Between two blocks the states of all windows lie where there is room for them (`iskd.blocks.streams`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.blocks.base import FitData, Run, fit_error, part
from iskd.blocks.merge import Merged, check_text, merged, unlike
from iskd.blocks.streams import Streams, enter
from iskd.models import Stack, scoring
from iskd.models.block_calls import BlockCalls
from iskd.models.capture import without_autocast_cache
from iskd.plan import Edit, Record, Replace
from iskd.plan.edits import REMOVALS, Merge
from iskd.plan.options import PLACES


@dataclass(frozen=True)
class Fitted:
    """Relative squared error of one compact block's output before and after its fit (1 = as large as the target)."""

    layer: int
    before: float
    after: float

    def __str__(self) -> str:
        return f"block {self.layer} fitted: relative squared error {self.before:.4f} -> {self.after:.4f}"


def warm_start(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    old_blocks: dict[int, nn.Module],
    record: Record,
    edits: Iterable[Edit],
    batches: Sequence[Tensor],
    held: Sequence[Tensor] = (),
    judge: Callable[[Sequence[Tensor]], float] | None = None,
    place: str = PLACES[0],
    folder: Path | None = None,
) -> list[Fitted | Merged]:
    """Fit the compact blocks that `edits` put into `student`, and merge what they merge.

    Args:
        student: the model after the edits.
        teacher: the frozen original.
        old_blocks: the replaced and merged blocks by layer, as they were in the student.
        record: the student's record (after the edits).
        edits: this stage's edits; only merges, and replacements by blocks with a `fit`, are touched.
        batches: calibration windows to fit to, each [B, T].
        held: others, which choose among fits.
        judge: says how far the student is from its teacher on those held out (nats per token), which decides
            whether a pair is merged or its upper block only removed. To be given where something is merged.
        place: where the states of all windows lie, one of `PLACES`: a stream of each model, and one
            of the teacher's own block on the student's.
        folder: of those on disk; None = where the system keeps temporary files.

    Returns:
        One `Fitted` per fitted block and one `Merged` per merge, in stack order.

    Raises:
        ValueError: there is no calibration text to merge on, or two blocks cannot be merged.
    """
    edits = tuple(edits)
    fits = {e.layer: e for e in edits if isinstance(e, Replace) and hasattr(e.block.resolve(), "fit")}
    pairs = _pairs(edits, old_blocks, record)
    judged: Callable[[], float] | None = None
    if pairs:
        assert judge is not None
        check_text(batches, held)
        judged = partial(judge, held)
    if not (fits or pairs) or not batches:
        return []
    streams = partial(Streams, place, next(student.parameters()).device, folder)
    # dropout would make fits noisy and draw from the run's random numbers
    with scoring(student, teacher, *old_blocks.values()), without_autocast_cache():
        return _walk(Stack(student), Stack(teacher), old_blocks, record, fits, pairs, (batches, held), judged, streams)


def _walk(
    student: Stack,
    teacher: Stack,
    old_blocks: dict[int, nn.Module],
    record: Record,
    fits: dict[int, Replace],
    pairs: dict[int, list[Merge]],
    text: tuple[Sequence[Tensor], Sequence[Tensor]],
    judge: Callable[[], float] | None,
    streams: Callable[[], Streams],
) -> list[Fitted | Merged]:
    device = next(student.model.parameters()).device
    batches, count = [batch.to(device) for batch in (*text[0], *text[1])], len(text[0])
    inputs, goals = streams(), streams()
    ours, theirs = enter(student, batches, inputs, streams()), enter(teacher, batches, goals, streams())
    last = max(record.layers.index(layer) for layer in (*fits, *pairs))
    below = 0  # the teacher's next layer
    done: list[Fitted | Merged] = []
    for position in range(last + 1):
        layer, block = record.layers[position], student.layers[position]

        def run(module: nn.Module, h_BTD: Tensor, index: int, position: int = position) -> Tensor:
            return ours[index].run(position, module, h_BTD)

        def data_to(after: int, layer: int = layer, run: Run = run) -> FitData:
            """What is fitted to the teacher's state behind the block `after`."""
            nonlocal below
            if below <= layer:
                below = _advance(teacher, theirs, goals, below, layer - 1)
                alike = all(torch.equal(inputs[index], goals[index]) for index in range(count))
            else:
                alike = False
            own = None
            if not alike:
                own = streams()
                for index in range(count):
                    own[index] = inputs[index]
                _advance(teacher, theirs[:count], own, layer, after)
            below = _advance(teacher, theirs, goals, below, after)
            held = part(inputs, goals, run, student, count, len(batches))
            return replace(part(inputs, goals, run, student, 0, count), own=own, held=held if held.inputs else None)

        if layer in fits:
            data = data_to(record.state_after(layer))
            done.append(_fit(block, old_blocks[layer], data, fits[layer]))
        for merge in pairs.get(layer, ()):
            # all but the last stand for what is merged so far, the last for the whole gap
            after = record.state_after(layer) if merge is pairs[layer][-1] else merge.layer
            assert judge is not None
            done.append(_merge(block, old_blocks[merge.layer], data_to(after), merge, layer, judge))
        if position < last:
            for index in range(len(batches)):
                inputs[index] = run(block, inputs[index], index)
    return done


def _advance(stack: Stack, calls: Sequence[BlockCalls], stream: Streams, below: int, after: int) -> int:
    """Take a stream from before the block `below` to after the block `after`; returns the next one."""
    for number in range(below, after + 1):
        for index, call in enumerate(calls):
            stream[index] = call.run(number, stack.layers[number], stream[index])
    return after + 1


def _fit(block: nn.Module, old: nn.Module, data: FitData, edit: Replace) -> Fitted:
    """Fit a block, and take it back where that is no nearer to the teacher's state."""
    before, kept = fit_error(block, data.judging), {name: value.clone() for name, value in block.state_dict().items()}
    edit.block.resolve().fit(block, old, data, **edit.block.kwargs)  # type: ignore[attr-defined]
    after = fit_error(block, data.judging)
    if not after < before:
        block.load_state_dict(kept)
    return Fitted(edit.layer, before, min(before, after) if math.isfinite(after) else before)


def _merge(
    block: nn.Module, upper: nn.Module, data: FitData, merge: Merge, layer: int, judge: Callable[[], float]
) -> Merged:
    """Merge `upper` into the block of the stack, and take it back where that is no nearer to the teacher."""
    removed = judge()
    if why := unlike(block, upper, data.stack):
        return Merged(merge.layer, layer, removed, removed, why)
    kept = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block.load_state_dict(merged(block, upper, data, merge.ridge).state_dict())
    found = Merged(merge.layer, layer, removed, judge())
    if not found.better:
        block.load_state_dict(kept)
    return found


def _pairs(edits: Sequence[Edit], old_blocks: dict[int, nn.Module], record: Record) -> dict[int, list[Merge]]:
    """By surviving layer the merges into it, from below to above. Raises ValueError where two blocks do not fit."""
    changed = {edit.layer for edit in edits if not isinstance(edit, REMOVALS)}
    found: dict[int, list[Merge]] = {}
    for merge in sorted((edit for edit in edits if isinstance(edit, Merge)), key=lambda edit: edit.layer):
        below = record.below(merge.layer)
        if below is None:
            raise ValueError(f"merge {merge.layer}: all layers below it were removed; remove it too (edit=remove)")
        if below in changed or _shapes(old_blocks[below]) != _shapes(old_blocks[merge.layer]):
            raise ValueError(
                f"merge {merge.layer} into {below}: the block at layer {below} is another kind of block; merge in a "
                "stage before it is replaced or converted, or remove the layer (edit=remove)"
            )
        found.setdefault(below, []).append(merge)
    return found


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in block.named_parameters()}

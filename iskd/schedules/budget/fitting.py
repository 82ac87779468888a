"""Every option of a layer fitted by itself: the teacher's own stream goes in, its state behind the layer is the goal.

So no fit depends on another one: layers may be fitted in any order, and by several processes. Closed form comes first
(a compact block's own fit, a merge, output projections re-solved behind a new mixer), then some epochs of training on
the block alone, of which the best by held-out text stays.

Source: block-wise local distillation of Puzzle (arXiv 2411.19146, section 3.1); the fits are those of the parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.blocks import Regression
from iskd.blocks.base import FitData, fit_error, part
from iskd.blocks.merge import merged
from iskd.blocks.streams import Streams, enter
from iskd.models import Stack, scoring
from iskd.models.block_calls import BlockCalls
from iskd.models.capture import without_autocast_cache
from iskd.plan import Convert, Edit, Record, Replace
from iskd.plan.edits import Merge
from iskd.refits import RefitTask
from iskd.refits.local import Local
from iskd.refits.output import Output
from iskd.refits.walk import Site, teacher_block
from iskd.schedules.budget.options import Option, module_of
from iskd.schedules.budget.settings import Budget
from iskd.schedules.budget.text import Texts


@dataclass(frozen=True)
class Fit:
    """A fitted block, and how far it is from what it stands for.

    Attributes:
        module: the block.
        before, after: relative squared error on held-out text, as it was made and fitted (1 = as large as the goal).
    """

    module: nn.Module
    before: float
    after: float


Keep = Callable[[int, Option, Fit], None]
Jobs = Mapping[int, Sequence[Option]]


def fit_options(
    teacher: PreTrainedModel, texts: Texts, jobs: Jobs, budget: Budget, seed: int, keep: Keep, told: Callable[[], None]
) -> None:
    """Fit options layer by layer, from below; the teacher is run once, up to the last layer that has something to fit.

    Args:
        teacher: the original; it stays as it is.
        texts: to fit to and to judge by, on its device.
        jobs: by layer what is to be fitted there.
        budget: epochs and rate.
        seed: of fresh weights.
        keep: called with every fit as soon as it is there.
        told: called before every fit.

    Raises:
        ValueError: a fit is singular or not finite.
    """
    wanted = {layer: list(options) for layer, options in jobs.items() if options}
    if not wanted:
        return
    with scoring(teacher), without_autocast_cache():
        walk = _Walk(teacher, texts)
        for at in walk.through(max(wanted)):
            for option in wanted.get(at.layer, ()):
                told()
                keep(at.layer, option, walk.fitted(at, option, budget, seed))


@dataclass(frozen=True)
class _At:
    """A layer of the teacher: what enters it and the one below it, its state between the halves, what leaves it.

    `systems` are the sums that fits of its options share (`FitData`).
    """

    layer: int
    below: Streams | None
    inputs: Streams
    middle: Streams | None
    outputs: Streams
    systems: dict[tuple[nn.Module, tuple[int, ...]], Regression] = field(default_factory=dict)


class _Walk:
    """The teacher's streams of all windows, a layer at a time."""

    def __init__(self, teacher: PreTrainedModel, texts: Texts) -> None:
        self.teacher, self.texts, self.stack = teacher, texts, Stack(teacher)
        self.calls: list[BlockCalls] = []

    def through(self, last: int) -> Iterator[_At]:
        """The layers from the lowest to `last`."""
        device = self.teacher.device
        below, inputs = None, Streams("device", device)
        batches = [*self.texts.fit, *self.texts.held]
        self.calls = enter(self.stack, batches, inputs, Streams("device", device))
        for layer in range(last + 1):
            outputs = Streams("device", device)
            middle = Streams("device", device) if self.stack.sequential else None
            for index, call in enumerate(self.calls):
                outputs[index], between = teacher_block(
                    self.stack, layer, call, inputs[index], apart=middle is not None
                )
                if middle is not None and between is not None:
                    middle[index] = between
            yield _At(layer, below, inputs, middle, outputs)
            below, inputs = inputs, outputs

    def fitted(self, at: _At, option: Option, budget: Budget, seed: int) -> Fit:
        """One option at one layer, fitted."""
        edit = option.make(at.layer, seed)
        position = at.layer - option.merges
        module = module_of(option, self.stack, at.layer, seed)
        assert module is not None
        inputs = at.below if option.merges else at.inputs
        assert inputs is not None
        made = module
        before = self._error(module, position, inputs, at.outputs)
        kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        if isinstance(edit, Merge):
            data = self._data(position, inputs, at.outputs)
            module = merged(self.stack.layers[position], self.stack.layers[at.layer], data, edit.ridge)
        elif isinstance(edit, Replace) and option.kind.fit and hasattr(part := edit.block.resolve(), "fit"):
            data = replace(self._data(position, inputs, at.outputs), systems=at.systems)
            part.fit(module, self.stack.layers[position], data, **edit.block.kwargs)
        self._refitted(module, position, inputs, at, edit, budget)
        after = self._error(module, position, inputs, at.outputs)
        if after < before:
            return Fit(module, before, after)
        made.load_state_dict(kept)  # a merge that is worse than the lower block alone is a removal
        return Fit(made, before, before)

    def _refitted(self, module: nn.Module, position: int, inputs: Streams, at: _At, edit: Edit, budget: Budget) -> None:
        """Output projections behind a new mixer, then the whole block by gradients; held-out text says what stays.

        Where a norm stands behind what a block adds no projection can be solved for, and gradients are all there is.
        """
        task = RefitTask(
            self.teacher, self.teacher, Record(len(self.stack.layers)), [], self.texts.fit, self.texts.held
        )
        middle = at.middle if isinstance(edit, Convert) else None

        def site() -> Site:
            return Site(position, position, module, inputs, at.outputs, middle, self.stack, None, self.calls)

        if isinstance(edit, Convert) and self.stack.adds_plainly:
            kept, before = copy.deepcopy(module.state_dict()), self._error(module, position, inputs, at.outputs)
            halves = ("attention", "mlp") if middle is not None else ("mlp",)
            Output(projections=halves).over(task, [site()])
            if not self._error(module, position, inputs, at.outputs) < before:
                module.load_state_dict(kept)
        if budget.epochs and any(True for _ in module.parameters()):
            Local(lr=budget.lr, epochs=budget.epochs).over(task, [site()])

    def _data(self, position: int, inputs: Streams, goals: Streams) -> FitData:
        """What the fits of blocks take."""
        count = len(self.texts.fit)
        fit, held = (
            part(inputs, goals, partial(self._run, position), self.stack, first, end)
            for first, end in ((0, count), (count, len(self.calls)))
        )
        return replace(fit, held=held)

    def _run(self, position: int, block: nn.Module, h_BTD: Tensor, index: int) -> Tensor:
        return self.calls[index].run(position, block, h_BTD)

    def _error(self, module: nn.Module, position: int, inputs: Streams, goals: Streams) -> float:
        """On held-out text."""
        with torch.no_grad():
            return fit_error(module, self._data(position, inputs, goals).judging)

"""The walk that most refits take: both models side by side, block by block, once.

Blocks at the bottom that are still the teacher's are walked past: what is exact a fit could only move by rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iskd.blocks.streams import Streams, enter
from iskd.models import Stack
from iskd.models.block_calls import BlockCalls
from iskd.models.capture import state_of
from iskd.plan.options import PLACES
from iskd.refits.base import Refit, RefitTask
from iskd.system.text import layers_text
from iskd.teacher import BatchStates

BLOCKS = ("gaps", "above", "all")


@dataclass(frozen=True, kw_only=True)
class BlockRefit(Refit):
    """A refit of some surviving blocks, one after the other.

    Attributes:
        blocks: which: those below the gaps (or at the edited layers) of these edits, those `above` too, or all.
        streams: where the states of all windows lie between two blocks: device, host or disk (below `cache_dir`).

    Raises:
        ValueError: a value that cannot work; the message names its key.
    """

    blocks: str = "all"
    streams: str = PLACES[0]  # type: ignore[misc]

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.blocks not in BLOCKS:
            raise ValueError(f"refit.{self.name()}.blocks={self.blocks!r}: choose {', '.join(BLOCKS)}")

    def refit(self, task: RefitTask) -> list[str]:
        """Refit the chosen blocks on a walk through both models; see `over`."""
        chosen, walked = self.chosen(task), list[int]()

        def sites() -> Iterator[Site]:
            for site in walk(task, self.streams, attention=self.between(Stack(task.student))):
                walked.append(site.layer)
                if site.layer in chosen:
                    yield site

        told = self.over(task, sites())
        same = [layer for layer in chosen if layer not in walked]
        return [*told, *([f"layers {layers_text(same)} are the teacher's still, and stay so"] if same else [])]

    def between(self, stack: Stack) -> bool:
        """Whether it reads the teacher's states before its MLPs (`Site.middle`)."""
        return False

    def changes(self, task: RefitTask) -> list[nn.Module]:
        """The chosen blocks."""
        return task.blocks(self.chosen(task))

    @abstractmethod
    def over(self, task: RefitTask, sites: Iterable[Site]) -> list[str]:
        """Refit the block of every site, one after the other; sentences worth telling.

        A site need not lie on a walk: the budget's library gives each block the teacher's own stream.
        """

    def chosen(self, task: RefitTask) -> list[int]:
        """The layers whose blocks are refitted, ascending."""
        survivors = list(task.record.layers)
        changed = sorted({*task.gaps(), *(edit.layer for edit in task.edits if edit.layer in survivors)})
        if self.blocks == "all":
            return survivors
        if self.blocks == "gaps":
            return changed
        lowest = min([*changed, *(edit.layer for edit in task.edits)], default=0)
        return [layer for layer in survivors if layer >= lowest]


@dataclass
class Site:
    """A surviving block, where the walk stands at it.

    Attributes:
        layer, position: in the teacher, and in the student's stack.
        block: the student's, with whole weights.
        inputs: the student's own stream before it, or the teacher's, for every batch [B, T, D].
        targets: the teacher's state after it, past the gap that may follow it.
        middle: what the teacher's attention at this layer has made of its stream, where the walk was asked for it:
            the state before the MLP. Nothing for blocks whose attention and MLP read the same stream.
        outputs: the block's, where a refit has computed them; the walk computes the others.
        stack: the student's.
    """

    layer: int
    position: int
    block: nn.Module
    inputs: Streams
    targets: Streams
    middle: Streams | None
    stack: Stack
    outputs: Streams | None
    _calls: Sequence[BlockCalls]

    def run(self, index: int) -> Tensor:
        """The block on batch `index` of the student's stream [B, T, D]."""
        return self._calls[index].run(self.position, self.block, self.inputs[index])

    def submodule(self, path: str) -> nn.Module | None:
        """The block's module at a dotted path of its family, or None where a compact block has none."""
        return submodule_at(self.block, path)


def submodule_at(block: nn.Module, path: str) -> nn.Module | None:
    """The module of a block at a dotted path of its family, or None where a compact block has none."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def walk(
    task: RefitTask, place: str = PLACES[0], *, attention: bool = False, independent: bool = False
) -> Iterator[Site]:
    """Both models side by side through all of a rank's windows: each block of either runs once.

    Yields the surviving blocks in stack order, but for those at the bottom that are untouched (`_untouched`): of the
    student's only the first batch runs through these. Whoever takes one may change its weights; the student's stream
    goes on through the new ones. Memory: the streams of all windows, at `place`, and one block of each model; of all
    windows nothing else lies on the device but their token ids.

    Args:
        task: student, teacher and text.
        place: where streams lie, one of `PLACES`.
        attention: whether the teacher's states before its MLPs are wanted.
        independent: whether the teacher's stream goes into every block, so that none waits for those below it; all
            blocks are yielded then.
    """
    ours, theirs = Stack(task.student), Stack(task.teacher)
    batches = task.batches
    student, teacher = task.streams(place), task.streams(place)
    own, original = (
        enter(stack, batches, into, task.streams(place)) for stack, into in ((ours, student), (theirs, teacher))
    )
    kept: list[BatchStates | None] = [
        None if task.states is None else task.states.of(batch, teacher[index]) for index, batch in enumerate(batches)
    ]
    between = task.streams(place) if attention and theirs.sequential else None
    below = 0  # the teacher's next layer
    alike = not independent and task.all_ranks(all(map(_same, student, teacher)))
    for position, layer in enumerate(task.record.layers):
        task.check_stop()
        above = task.record.state_after(layer) + 1
        if independent:
            student = task.streams(place)
            for index, state in enumerate(teacher):
                student[index] = state
        for index, states in enumerate(kept):
            teacher[index], middle = _advanced(
                theirs, range(below, above), layer, original[index], teacher[index], states, apart=between is not None
            )
            if between is not None and middle is not None:
                between[index] = middle
        below = above
        with task.opened(layer):
            block = ours.layers[position]
            site = Site(layer, position, block, student, teacher, between, ours, None, own)
            alike = alike and _untouched(task, site)
            if alike:
                for index, state in enumerate(teacher):
                    student[index] = state
                continue
            yield site
            if independent:
                continue
            if site.outputs is None:
                for index in range(len(batches)):
                    student[index] = site.run(index)
            else:
                student = site.outputs


def _advanced(
    stack: Stack,
    layers: range,
    survivor: int,
    calls: BlockCalls,
    h_BTD: Tensor,
    states: BatchStates | None,
    *,
    apart: bool,
) -> tuple[Tensor, Tensor | None]:
    """The teacher's state [B, T, D] past some of its layers, and with `apart` the one before the survivor's MLP.

    Of `states` what is kept there, which gets what is not.
    """
    found = None if states is None else states.get(layers[-1])
    middle = states.get(survivor, between=True) if apart and states is not None else None
    if found is not None and not (apart and middle is None):
        return found, middle
    found = h_BTD
    for layer in layers:
        found, added = teacher_block(stack, layer, calls, found, apart=apart)
        middle = added if layer == survivor else middle
    if states is not None:
        states.put(layers[-1], found)
        if middle is not None:
            states.put(survivor, middle, between=True)
    return found, middle


def _untouched(task: RefitTask, site: Site) -> bool:
    """Whether a block with the teacher's stream before it is as good as can be: the teacher's, as it was.

    It was not edited, no layer is gone right above it, and on the first batch of every rank (each has one) it gives the
    teacher's state to the last bit. A fit could only move it by rounding.
    """
    if site.layer in task.record.edited or task.record.state_after(site.layer) != site.layer:
        return False
    return task.all_ranks(_same(site.run(0), site.targets[0]))


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def attention_end(stack: Stack) -> str:
    """Path of the module of a block whose output, times the stack's residual scale, is what attention adds."""
    return stack.family.post_norms[0] if stack.family.post_norms else stack.family.attn


def teacher_block(
    stack: Stack, layer: int, calls: BlockCalls, h_BTD: Tensor, *, apart: bool
) -> tuple[Tensor, Tensor | None]:
    """State after a block, and where it is wanted the one between its attention and its MLP."""
    if not apart:
        return calls.run(layer, stack.layers[layer], h_BTD), None
    block, added = stack.layers[layer], list[Tensor]()
    handle = block.get_submodule(attention_end(stack)).register_forward_hook(
        lambda _module, _args, output: added.append(state_of(output))
    )
    try:
        after = calls.run(layer, block, h_BTD)
    finally:
        handle.remove()
    return after, h_BTD + stack.residual_scale * added[0]

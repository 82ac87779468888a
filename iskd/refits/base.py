"""What every refit offers, and the walk that most of them take: both models side by side, block by block, once.

A refit is a frozen dataclass with `refit(task) -> list[str]`: it changes weights of the student's surviving blocks, on
calibration text, right after an edit and before any training token, and says in sentences what it did. It changes no
structure. Whether the student is better for it is judged by `iskd.refits.carrying_out`, not by the refit itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.blocks.streams import Streams, enter
from iskd.models import Stack
from iskd.models.block_calls import BlockCalls
from iskd.models.capture import state_of
from iskd.plan import Edit, Record
from iskd.plan.edits import REMOVALS
from iskd.plan.options import PLACES
from iskd.system import Ranks
from iskd.system.text import layers_text
from iskd.teacher import BatchStates, TeacherStates

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCKS = ("gaps", "above", "all")


@dataclass(frozen=True, kw_only=True)
class Refit(ABC):
    """A refit, and the text that it reads.

    Attributes:
        tokens: calibration tokens, over all processes, that weights are fitted to.
        held_tokens: calibration tokens beside them that choose among fits and judge the refit.
        folds: parts of the text that are fitted to in turn, where a refit does that.
        streams: where states of all windows lie, one of `PLACES`.
        step_tokens: of each batch, where one is a step of training, however many processes share it; 0 = of none.
        for_mixers: whether it changes mixers alone, and a run without conversions has no use for it.
        prepares: whether it may pay with the next refit alone: where KL does not fall at once it is judged with that.
        resizes: whether states below a cut are of another size than the teacher's afterwards.

    Raises:
        ValueError: a value that cannot work; the message names its key.
    """

    tokens: PositiveInt = 32_768
    held_tokens: PositiveInt = 8_192
    folds: ClassVar[int] = 1
    streams: ClassVar[str] = PLACES[0]
    step_tokens: ClassVar[int] = 0
    for_mixers: ClassVar[bool] = False
    prepares: ClassVar[bool] = False
    resizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the values."""
        name = self.name()
        for key in ("tokens", "held_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(
                    f"refit.{name}.{key}={getattr(self, key)}: a refit needs calibration text; give more, or use "
                    "refit=none"
                )
        if self.streams not in PLACES:
            raise ValueError(f"refit.{name}.streams={self.streams!r}: choose {', '.join(PLACES)}")

    @classmethod
    def name(cls) -> str:
        """What messages and the config call it."""
        return cls.__name__.lower()

    def on(self, share: float, least: int = 1) -> Self:
        """This refit with a share of its text, and `least` tokens of each kind or more."""
        tokens, held = (max(1, least, round(share * count)) for count in (self.tokens, self.held_tokens))
        return replace(self, tokens=tokens, held_tokens=held)

    @property
    @abstractmethod
    def passes(self) -> float:
        """What it costs at most, in forward passes of one model's blocks over its text; a backward pass counts two.

        Blocks that are still the teacher's own below the lowest edit (see `walk`) cost a pass of the teacher's alone.
        """

    @property
    def by_layers(self) -> bool:
        """Whether processes share out the layers, and each reads all windows; otherwise they share out the windows."""
        return False

    def check(self, stack: Stack, edits: Sequence[Edit] = ()) -> None:  # noqa: B027
        """Raise ValueError where it cannot be carried out after some edits.

        Asked before a run scores or edits anything.

        Args:
            stack: the teacher.
            edits: all of the student by then; which layers they are of may turn out otherwise.
        """

    def changes(self, task: RefitTask) -> list[nn.Module]:
        """Modules that hold all weights it may change: what has to be kept in case that it is taken back."""
        return [task.student]

    @abstractmethod
    def refit(self, task: RefitTask) -> list[str]:
        """Change the student's weights, on every rank alike; sentences worth telling."""


@dataclass(frozen=True)
class RefitTask:
    """One student right after an edit, and the text to refit it on. Evaluation mode, gradients off.

    Attributes:
        student: the model; its weights change.
        teacher: the frozen original.
        record: the student's edits.
        edits: those that the refits follow: of this stage, and of stages before it without refits.
        fit: this rank's windows to fit to, each [B, T].
        fold_of: the fold that each of them is in.
        held: this rank's windows to choose and judge by.
        ranks: the processes of the run.
        opened: puts the block of a layer in with whole weights while a context lasts (`iskd.models.sharding`).
        check_stop: called between blocks; raises where the run is to end.
        states: where the teacher's states are read from and kept; None = its blocks run.
        folder: where streams on disk lie; None = where the system keeps temporary files.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    record: Record
    edits: Sequence[Edit]
    fit: Sequence[Tensor]
    held: Sequence[Tensor]
    fold_of: Sequence[int] = ()
    ranks: Ranks = field(default_factory=Ranks)
    opened: Callable[[int], AbstractContextManager[None]] = lambda _layer: nullcontext()
    check_stop: Callable[[], None] = lambda: None
    states: TeacherStates | None = None
    folder: Path | None = None

    def streams(self, place: str) -> Streams:
        """Room at a place of `PLACES` for a tensor of each batch."""
        return Streams(place, self.device, self.folder)

    @property
    def batches(self) -> list[Tensor]:
        """All of this rank's windows on the student's device, those to fit to first."""
        return [batch.to(self.device) for batch in (*self.fit, *self.held)]

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(self.student.parameters()).device

    @property
    def folds(self) -> int:
        """How many folds there are, on all ranks."""
        return max(self.ranks.gather(max(self.fold_of, default=0))) + 1

    def all_ranks(self, here: bool) -> bool:
        """Whether something holds on every rank; a collective."""
        return all(self.ranks.gather(here))

    def fold(self, index: int) -> int:
        """Which fold the batch of that number is in; -1 = it is held out."""
        return -1 if index >= len(self.fit) else self.fold_of[index] if self.fold_of else 0

    def blocks(self, layers: Collection[int]) -> list[nn.Module]:
        """The student's blocks at some layers of the teacher, in stack order."""
        stack = Stack(self.student).layers
        return [block for layer, block in zip(self.record.layers, stack, strict=True) if layer in layers]

    def gaps(self) -> list[int]:
        """Surviving layers right below a gap that these edits have made or widened, ascending."""
        removed = {edit.layer for edit in self.edits if isinstance(edit, REMOVALS)}
        return [
            layer for layer in self.record.layers if removed & set(range(layer + 1, self.record.state_after(layer) + 1))
        ]


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
            found = None if states is None else states.get(above - 1)
            middle = None if states is None or between is None else states.get(layer, between=True)
            if found is None or (between is not None and middle is None):
                found = teacher[index]
                for number in range(below, above):
                    found, added = teacher_block(theirs, number, original[index], found, apart=between is not None)
                    middle = added if number == layer else middle
                if states is not None:
                    states.put(above - 1, found)
                    if middle is not None:
                        states.put(layer, middle, between=True)
            teacher[index] = found
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

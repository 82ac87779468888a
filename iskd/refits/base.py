"""What every refit offers, and what it works on.

A refit is a frozen dataclass with `refit(task) -> list[str]`: it changes weights of the student's surviving blocks, on
calibration text, right after an edit and before any training token, and says in sentences what it did. It changes no
structure. Whether the student is better for it is judged by `iskd.refits.carrying_out`, not by the refit itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.blocks.streams import Streams
from iskd.models import Stack
from iskd.plan import Edit, Record
from iskd.plan.edits import REMOVALS
from iskd.plan.options import PLACES
from iskd.system import Ranks
from iskd.teacher import TeacherStates

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

"""What options cost in nats: KL of the teacher to students in which the blocks of some layers are exchanged.

All of it is one question, asked of a student (`base`) and of choices near it: the sweep over shared prefixes
(`iskd.importance.sweep`) runs what lies below the first difference once for all. Single options are raced: all are
read on few windows, and an option that is beyond doubt worse than a cheaper one of its layer is not read any further.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.importance.racing import doubt
from iskd.importance.sweep import Exchange, Goal, exchange_values, goal_of
from iskd.models import Stack, scoring
from iskd.plan.budget_plan import KEEP
from iskd.schedules.budget.library import Kept, Library
from iskd.schedules.budget.options import Option, layers_of
from iskd.schedules.budget.students import Choice, Place, assembled, places

_BATCH = 1024  # tokens of the windows that are read together
_ROOM = 1 << 30  # bytes of fitted blocks in memory at a time
_ROUNDS = (0.125, 0.25, 0.5, 1.0)  # shares of the windows after which options may be out
_Z = 2.3  # standard errors
_STUDENTS, _ANEW = "students.safetensors", "options are scored"
HOPELESS = 1e3
"""Nats, of a student whose states are not finite."""

Single = tuple[int, str]
"""An option of a layer."""


class Scorer:
    """Asks for the KL of students near the teacher.

    Args:
        teacher: the original, on its device.
        library: of fitted options.
        options: by name.
        windows: to score on, [1, T] each, on the teacher's device.
        stride: every so many-th position is scored where options are compared.
        told: called with what is being done, how much of it is done, and of how much.

    Attributes:
        rows: of every single option the KL at every scored position of the windows that were read [W, P].
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        library: Library,
        options: Sequence[Option],
        windows: Sequence[Tensor],
        stride: int,
        told: Callable[[str, int, int], None] = lambda _what, _done, _of: None,
    ) -> None:
        self.teacher, self.library, self.windows, self.stride = teacher, library, list(windows), stride
        self.options = {option.name: option for option in options}
        self.depth, self._told = len(Stack(teacher).layers), told
        self.rows: dict[Single, Tensor] = {}
        on = next(teacher.parameters()).device
        self._students = {name: row.to(on) for name, row in Kept(library.folder / _STUDENTS, _ANEW).read().items()}
        self._goals: dict[tuple[tuple[int, ...], int], Goal] = {}
        self._together = max(1, _BATCH // self.windows[0].shape[1])

    @property
    def whole(self) -> Choice:
        """The teacher itself."""
        return (KEEP,) * self.depth

    @property
    def singles(self) -> list[Single]:
        """Every option of every layer, from below."""
        stack = Stack(self.teacher)
        where = {name: layers_of(option, stack) for name, option in self.options.items()}
        return [(layer, name) for layer in range(self.depth) for name, layers in where.items() if layer in layers]

    def values(
        self,
        base: Choice,
        changed: Sequence[Choice],
        windows: Sequence[int],
        *,
        stride: int | None = None,
        what: str = "",
        kept: bool = True,
    ) -> Tensor:
        """KL of the teacher to every changed student at every scored position [C, W, P], in nats.

        What was asked before, by whichever search of this library, is read off it.

        Where it is not finite it is `HOPELESS`: a student that breaks is worse than any other, and no reason to end.

        Args:
            base: the student that the others are near to.
            changed: C students.
            windows: numbers of the W windows to read.
            stride: of the scored positions; None = the scorer's.
            what: is being done.
            kept: keep the answers in the library.
        """
        stride = stride or self.stride
        names = [self.name_of(choice, f"{[*windows]} every {stride}") for choice in changed]
        known = {name: self._students[name] for name in names if kept and name in self._students}
        lacking = [index for index, name in enumerate(names) if name not in known]
        if lacking:
            fresh = self._fresh(base, [changed[index] for index in lacking], windows, stride, what)
            answers = {names[index]: row for index, row in zip(lacking, fresh, strict=True)}
            known |= answers
            if kept:
                self.keep(answers)
        return torch.stack([known[name] for name in names])

    def name_of(self, choice: Choice, asked: str) -> str:
        """What is kept of a student, as an answer to some question, is called."""
        parts = [KEEP if name == KEEP else self.options[name].digest for name in choice]
        return hashlib.sha256(" ".join([*parts, asked]).encode()).hexdigest()[:32]

    def known(self, name: str) -> Tensor | None:
        """What is kept under a name."""
        return self._students.get(name)

    def keep(self, answers: Mapping[str, Tensor]) -> None:
        """Keep answers about students, by name."""
        self._students |= answers
        Kept(self.library.folder / _STUDENTS, _ANEW).add(answers)

    def _fresh(
        self, base: Choice, changed: Sequence[Choice], windows: Sequence[int], stride: int, what: str
    ) -> list[Tensor]:
        """`values` of students of which nothing is kept."""
        standing = places(base, self.options)
        student = self.student(base)
        wanted = [
            {at: place for at, place in enumerate(places(choice, self.options)) if place != standing[at]}
            for choice in changed
        ]
        found: dict[int, Tensor] = {}
        with scoring(student, self.teacher):
            for group, modules in self._groups(wanted):
                branches = [self._exchange(wanted[index], modules) for index in group]
                rows = [
                    exchange_values(student, self.teacher, batch, branches, stride=stride, goal=goal)
                    for batch, goal in self._batches(windows, stride)
                ]
                for index, row in zip(group, torch.cat(rows, dim=1), strict=True):
                    found[index] = row.nan_to_num(HOPELESS, HOPELESS, HOPELESS)
                if what:
                    self._told(what, len(found), len(changed))
        return [found[index] for index in range(len(changed))]

    def _batches(self, windows: Sequence[int], stride: int) -> Iterator[tuple[Tensor, Goal]]:
        """Windows that are read together, and what the teacher says there, which is asked of it once."""
        for start in range(0, len(windows), self._together):
            read = tuple(windows[start : start + self._together])
            batch = torch.cat([self.windows[window] for window in read])
            if (read, stride) not in self._goals:
                self._goals[read, stride] = goal_of(self.teacher, batch, slice(0, None, stride))
            yield batch, self._goals[read, stride]

    def kl(self, choice: Choice) -> float:
        """KL of one student on all windows and positions, mean in nats."""
        return self.values(choice, [choice], range(len(self.windows)), stride=1).mean().item()

    def student(self, choice: Choice) -> PreTrainedModel:
        """A choice as a model, at full depth: blocks of the library, and what does nothing where a layer is gone."""
        return assembled(
            self.teacher,
            {
                at: self.library.block(place[0], self.options[place[1]]) if isinstance(place, tuple) else None
                for at, place in enumerate(places(choice, self.options))
                if place != "keep"
            },
        )

    def _groups(self, wanted: Sequence[Mapping[int, Place]]) -> Iterator[tuple[list[int], dict[Place, nn.Module]]]:
        """Changes whose blocks fit into memory together, near ones side by side, with these blocks."""
        order = sorted(range(len(wanted)), key=lambda index: min(wanted[index], default=0))
        group, modules, taken = list[int](), dict[Place, nn.Module](), 0
        for index in order:
            for place in wanted[index].values():
                if isinstance(place, tuple) and place not in modules:
                    module = self.library.block(place[0], self.options[place[1]])
                    assert module is not None
                    modules[place] = module
                    taken += sum(parameter.nbytes for parameter in module.parameters())
            group.append(index)
            if taken > _ROOM:
                yield group, modules
                group, modules, taken = [], {}, 0
        if group:
            yield group, modules

    def _exchange(self, wanted: Mapping[int, Place], modules: Mapping[Place, nn.Module]) -> Exchange:
        own = Stack(self.teacher).layers
        return {
            at: own[at] if place == "keep" else None if place == "gone" else modules[place]
            for at, place in wanted.items()
        }

    def with_one(self, base: Choice, single: Single) -> Choice:
        """A choice with another option at one layer."""
        layer, name = single
        return (*base[:layer], name, *base[layer + 1 :])

    def raced(self, tokens: int | None) -> int:
        """How many windows single options are read on, of so many tokens at most; None = all."""
        count = len(self.windows)
        return count if tokens is None else min(count, max(1, tokens // self.windows[0].shape[1]))

    def race(
        self, costs: Mapping[Single, Sequence[float]], tokens: int | None = None, *, all_of_them: bool = False
    ) -> tuple[dict[Single, float], list[Single]]:
        """KL of the teacher with one layer exchanged, of every option of every layer; and who is not out.

        An option is out once it is beyond doubt worse than another one of its layer that costs no more; its score is
        then the mean over what was read. What has been read before, for another budget, is read off the library.

        Args:
            costs: of every option of every layer, and of keeping it (`KEEP`), as many numbers as count.
            tokens: of the text for scores, at most; None = all of it.
            all_of_them: nobody is out.
        """
        known, count = self._known(), self.raced(tokens)
        alive = self.singles
        for share in _ROUNDS:
            read = max(1, round(share * count))
            self._read(known, alive, read)
            if not all_of_them and read < count:
                alive = [single for single in alive if not self._out(single, alive, known, costs, read, count)]
        # a library may know more windows of some, read for a larger budget
        self.rows = {single: known[single][:count] for single in self.singles}
        return {single: rows.mean().item() for single, rows in self.rows.items()}, alive

    def _read(self, known: dict[Single, Tensor], alive: Sequence[Single], read: int) -> None:
        """Read windows up to `read` for those that lack them; written down at once."""
        lacking: dict[int, list[Single]] = {}
        for single in alive:
            have = len(known[single]) if single in known else 0
            if have < read:
                lacking.setdefault(have, []).append(single)
        for have, group in lacking.items():
            changed = [self.with_one(self.whole, single) for single in group]
            values = self.values(
                self.whole, changed, range(have, read), what=f"scoring options, to window {read}", kept=False
            )
            if group and (values >= HOPELESS).any(2).any(1).all():
                raise ValueError(
                    "no option can be scored, as the KL to the teacher is not finite with any of them: check the "
                    "teacher's weights, or search in float32 (trainer.precision=32-true)"
                )
            for single, row in zip(group, values, strict=True):
                known[single] = torch.cat([known[single], row]) if have else row
        if lacking:  # options that are not asked for keep theirs
            Kept(self._file, _ANEW).add({self._name(single): rows for single, rows in known.items()})

    def _out(
        self,
        single: Single,
        alive: Sequence[Single],
        known: Mapping[Single, Tensor],
        costs: Mapping[Single, Sequence[float]],
        read: int,
        count: int,
    ) -> bool:
        layer, mine = single[0], known[single][:read]
        for other in alive:
            if other[0] != layer or other == single or self.options[other[1]].merges:  # a merge binds its neighbour
                continue
            if any(theirs > own for theirs, own in zip(costs[other], costs[single], strict=True)):
                continue
            pairs = list(mine - known[other][:read])
            if torch.stack(pairs).double().mean().item() > doubt(pairs, _Z, count):
                return True
        return False

    @property
    def _file(self) -> Path:
        return self.library.folder / f"scores-{self.stride}.safetensors"

    def _name(self, single: Single) -> str:
        return f"{single[0]:03d}-{self.options[single[1]].digest}"

    def _known(self) -> dict[Single, Tensor]:
        """What was read before, of options that are there."""
        found, positions = Kept(self._file, _ANEW).read(), len(range(0, self.windows[0].shape[1], self.stride))
        return {
            single: found[name]
            for single in self.singles
            if (name := self._name(single)) in found
            and found[name].dim() == 2
            and found[name].shape[1] == positions
            and len(found[name]) <= len(self.windows)
        }

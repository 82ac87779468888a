"""Layers taken out one by one, each time the one that the student so far misses least: such scores do not add up.

Source: leave-one-out and repeat, as ILD (arXiv 2511.05085), here without healing in between; a merge competes with the
removal of the same layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from iskd.plan.budget_plan import KEEP
from iskd.schedules.budget.options import Option
from iskd.schedules.budget.scores import Scorer
from iskd.schedules.budget.students import Choice

_COARSE = 0.25  # share of the windows on which scores around a student are taken


class Chain:
    """Students with ever fewer layers, made as far as somebody asks; their other layers are the teacher's.

    Args:
        scorer: asks for KLs.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self._students = scorer, [scorer.whole]
        self._ended = False

    def without(self, count: int) -> Choice | None:
        """The student without so many layers; None where as many cannot go."""
        while len(self._students) <= count and not self._ended:
            longer = self._one_less(self._students[-1])
            self._ended = longer is None
            self._students += [] if longer is None else [longer]
        return self._students[count] if count < len(self._students) else None

    def _one_less(self, base: Choice) -> Choice | None:
        scorer = self._scorer
        choices = [
            scorer.with_one(base, (layer, name))
            for layer, name in scorer.singles
            if scorer.options[name].removes and base[layer] == KEEP
        ]
        changed = [choice for choice in choices if possible(choice, scorer.options)]
        if not changed:
            return None
        windows = coarse(len(scorer.windows))
        kls = scorer.values(base, changed, windows, what="taking out layers").mean((1, 2)).tolist()
        return min(zip(kls, changed, strict=True))[1]


def coarse(windows: int) -> range:
    """The windows on which scores around a student are taken."""
    return range(max(1, round(_COARSE * windows)))


def possible(choice: Choice, options: Mapping[str, Option]) -> bool:
    """Whether such a student can be: every merge has a kept layer below it, and a layer is left."""
    kinds = [None if name == KEEP else options[name] for name in choice]
    merged = all(
        kind is None or not kind.merges or (at > 0 and choice[at - 1] == KEEP) for at, kind in enumerate(kinds)
    )
    return merged and any(kind is None or not kind.removes for kind in kinds)

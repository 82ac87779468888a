"""Layers that are taken out together, by the KL of the student without all of them: single scores do not add up.

Either one by one, each time the one that the student so far misses least, or neighbours, which leave one gap: of the
choices in experiments/refit-smollm2 (layers.csv) that is the nearest after a refit.
Whoever was missed much is not asked at every step: those that were missed least when they were last asked are.

Source: leave-one-out and repeat, as ILD (arXiv 2511.05085), here without healing in between; a merge competes with the
removal of the same layer. Asking few again is the lazy greedy search of Minoux (1978), as a heuristic here. One gap by
its common cost: ours.
"""

from __future__ import annotations

from collections.abc import Mapping

from iskd.plan.budget_plan import KEEP
from iskd.schedules.budget.options import Option
from iskd.schedules.budget.scores import Scorer, Single
from iskd.schedules.budget.students import Choice

_ASKED = 12
_COARSE = 0.25  # share of the windows on which scores around a student are taken


class Chain:
    """Students with ever fewer layers, made as far as somebody asks; their other layers are the teacher's.

    Attributes:
        said: what is taken out, for people.

    Args:
        scorer: asks for KLs.
        scores: of single options, nats.
        asked: how many are asked at every step.
        merges: whether layers may also be merged into those below.
    """

    def __init__(
        self, scorer: Scorer, scores: Mapping[Single, float], asked: int = _ASKED, *, merges: bool = True
    ) -> None:
        self.said = "layers"
        self._scorer, self._students, self._asked = scorer, [scorer.whole], asked
        options = scorer.options
        self._missed = {
            single: scores[single]
            for single in scorer.singles
            if options[single[1]].removes and (merges or not options[single[1]].merges)
        }
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
        left = [
            single
            for single in sorted(self._missed, key=lambda single: self._missed[single])
            if base[single[0]] == KEEP and possible(scorer.with_one(base, single), scorer.options)
        ][: self._asked]
        if not left:
            return None
        changed = [base, *(scorer.with_one(base, single) for single in left)]
        windows = coarse(len(scorer.windows))
        kls = scorer.values(base, changed, windows, what="taking out layers").mean((1, 2)).tolist()
        self._missed |= {single: kl - kls[0] for single, kl in zip(left, kls[1:], strict=True)}
        return min(zip(kls[1:], changed[1:], strict=True))[1]


class Gap:
    """Students without so many neighbours, of all places the one where they are missed least.

    Attributes:
        said: what is taken out, for people.

    Args:
        scorer: asks for KLs.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.said = "neighbouring layers"
        self._scorer, self._students = scorer, dict[int, Choice | None]()
        options = scorer.options.values()
        self._removal = next((option.name for option in options if option.removes and not option.merges), None)

    def without(self, count: int) -> Choice | None:
        """The student without so many layers; None where as many cannot go."""
        if count not in self._students:
            self._students[count] = self._least(count)
        return self._students[count]

    def _least(self, count: int) -> Choice | None:
        scorer, left = self._scorer, self._scorer.depth - count
        if self._removal is None or left < 1:
            return None
        changed = [
            (*(KEEP,) * start, *(self._removal,) * count, *(KEEP,) * (left - start)) for start in range(left + 1)
        ]
        windows = coarse(len(scorer.windows))
        kls = scorer.values(scorer.whole, changed, windows, what="taking out neighbours").mean((1, 2)).tolist()
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

"""ReplaceMe: a gap is bridged by one linear map on the MLP output of the block below it, folded into that MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import nn

from iskd.blocks import Ridge
from iskd.blocks.ridge import Solution
from iskd.models import Stack
from iskd.plan import Edit
from iskd.plan.edits import REMOVALS
from iskd.plan.options import PLACES
from iskd.refits.base import Refit, RefitTask
from iskd.refits.projections import Projection, check_plain, checked, few
from iskd.refits.walk import Site, walk

_COMPACT = (
    "refit=replaceme folds a map into the MLP of layer {}, where a compact block without one is: use refit=output"
)


@dataclass(frozen=True)
class ReplaceMe(Refit):
    """Least squares of a D x D map T, so that the MLP's output times T is what the teacher's stream has past the gap.

    All tokens count alike, as published. Several gaps are bridged from the bottom up, on the student's own stream; the
    published procedure has one gap, where both are the same.

    Attributes:
        ridge: pull towards the identity, in units of the mean of diag(A^T A); the published value is 0.
        streams: where the states of all windows lie between two blocks: device, host or disk (below `cache_dir`).

    Source: ReplaceMe (arXiv 2505.02819, section 3, least squares)
    Needs: calibration tokens (`refit.replaceme.tokens`); removals with a survivor below them
    Costs: one pass of the teacher's blocks and one of the student's, gram matrices of D inputs below the gaps
    Measured: not measured
    """

    _: KW_ONLY
    tokens: PositiveInt = 16_384
    ridge: NonNegativeFloat = 0.0
    streams: str = PLACES[0]  # type: ignore[misc]

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"refit.replaceme.ridge={self.ridge}: give a number, 0 or more")

    @property
    def passes(self) -> float:
        """One of each model."""
        return 2.0

    def check(self, stack: Stack, edits: Sequence[Edit] = ()) -> None:
        """Raise ValueError for a model with norms behind what its blocks add."""
        check_plain(stack, self.name())

    def changes(self, task: RefitTask) -> list[nn.Module]:
        """The blocks below the gaps."""
        return task.blocks(task.gaps())

    def refit(self, task: RefitTask) -> list[str]:
        """Bridge; see the class."""
        gaps, told = task.gaps(), []
        removed = [edit.layer for edit in task.edits if isinstance(edit, REMOVALS)]
        if not gaps:
            return [
                "nothing to bridge: no removed layer has a survivor below it" if removed else "no layer was removed"
            ]
        for site in walk(task, self.streams):
            if site.layer in gaps:
                told.append(self._bridge(task, site))
        return told

    def _bridge(self, task: RefitTask, site: Site) -> str:
        down = Projection.at(site, site.stack.family.down)
        if down is None:
            return _COMPACT.format(site.layer)  # which layers these are turns out in a run
        down.check_last(0)
        width = site.stack.dims.hidden
        system = Ridge(width, width, bias=False, device=task.device)
        for index in range(len(task.fit)):
            _, added, output = down.seen(index)
            system.add(added, site.targets[index].float() - (output - added).float(), torch.ones_like(added[..., :1]))
        task.ranks.add(system.sums)
        checked([system], f"layer {site.layer}")
        identity = torch.eye(width, dtype=torch.float64, device=task.device)
        found = system.solution(Solution(identity, None), self.ridge).weight  # T^T [D, D]
        old = down.start()
        down.write(Solution(found @ old.weight, None if old.bias is None else found @ old.bias))
        turn = float((found - identity).norm() / identity.norm())
        told = f"layer {site.layer} bridges its gap with a map at {turn:.2f} times the identity's norm from it"
        return "; ".join([told, *few(system.rows, width, "the map", "refit.replaceme.tokens", ridge=self.ridge > 0)])

"""Output projections re-solved in closed form: what a block adds to the stream is put right for what is missing.

The walk goes through the surviving blocks. At each, the inputs of its output projection on the student's own stream
are regressed on what the teacher's state (past the gap, where one follows) still lacks, pulled towards the weights that
the projection has. So every survivor, and not only the block below a gap, makes up for a cut.

The text may be fitted to in folds: weights solved on all folds but one carry that one's stream on, and the weights of
the student are solved on all of them, so that no block is fitted to streams on which the blocks below it look better
than they are. No table says yet that this gives the better student, so one fold is the default.

Ridge and damping are chosen for each projection on text that was not fitted to; where no choice has a lower error there
than the old weights, those stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from iskd.blocks import Ridge
from iskd.blocks.ridge import RIDGES, Solution, lowest, row_weights
from iskd.blocks.streams import Streams
from iskd.models import Stack
from iskd.plan import Edit
from iskd.refits.base import RefitTask
from iskd.refits.projections import MIXER_OUT, Projection, check_plain, checked, own_map
from iskd.refits.solved import Solved, first_ridge, summary
from iskd.refits.walk import BlockRefit, Site

PROJECTIONS = ("attention", "mlp")
SHARES = (0.25, 0.5, 0.75, 1.0)
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Output(BlockRefit):
    """Ridge regression of the blocks' output projections towards the teacher's state, block after block.

    Attributes:
        projections: `mlp` (down_proj, and the last map of a compact block) and `attention` (o_proj, before it), or one.
        ridge: strengths to choose from, in units of the mean of diag(X^T X).
        attention_share: how far o_proj goes towards what puts the stream right; less than 1, as it is given a target
            that its block's MLP has a part in. A list = chosen like the ridge.
        folds: of the text; 1 = none: ridge and share are chosen on the tokens held out.

    Source: ours; the normal equations of `block=slim`, and GPTAQ's choice of a target (arXiv 2504.02692): the student's
        inputs, the teacher's output
    Needs: calibration tokens (`refit.output.tokens`)
    Costs: one pass of the teacher's blocks and one of the student's, gram matrices of C inputs, for all blocks
    Measured: SmolLM2 without four of its layers, before any training: KL 0.232, retention 94.4 %
        (experiments/refit-smollm2/README.md)
    """

    _: KW_ONLY
    projections: Sequence[str] = ("attention", "mlp")
    ridge: Sequence[PositiveFloat] | PositiveFloat = RIDGES
    attention_share: Sequence[Share] | Share = SHARES
    folds: PositiveInt = 1  # type: ignore[misc]

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        given = self.projections
        if isinstance(given, str) or not given or set(given) - set(PROJECTIONS):
            shown = given if isinstance(given, str) else list(given)
            raise ValueError(
                f"refit.output.projections={shown}: give a list of one or both of {', '.join(PROJECTIONS)}"
            )
        if not self._ridges or not all(0 < ridge < math.inf for ridge in self._ridges):
            raise ValueError(f"refit.output.ridge={self.ridge}: give a positive number, or a list of them")
        if not self._shares or not all(0 < share <= 1 for share in self._shares):
            raise ValueError(f"refit.output.attention_share={self.attention_share}: give numbers in (0, 1]")
        if self.folds < 1:
            raise ValueError(f"refit.output.folds={self.folds}: give 1 (no folds) or more")

    @property
    def _ridges(self) -> tuple[float, ...]:
        return (self.ridge,) if isinstance(self.ridge, (int, float)) else tuple(sorted(self.ridge))

    @property
    def _shares(self) -> tuple[float, ...]:
        share = self.attention_share
        return (share,) if isinstance(share, (int, float)) else tuple(share)

    @property
    def passes(self) -> float:
        """One of each model, and the gram matrices, which are about as many products as a block's own maps."""
        return 2.0 + len(self.projections) / len(PROJECTIONS)

    def between(self, stack: Stack) -> bool:
        """Where the attention's output is re-solved, and the MLP reads it."""
        return "attention" in self.projections and stack.sequential

    def check(self, stack: Stack, edits: Sequence[Edit] = ()) -> None:
        """Raise ValueError for a model with norms behind what its blocks add."""
        check_plain(stack, self.name())

    def changes(self, task: RefitTask) -> list[nn.Module]:
        """The projections of the chosen blocks."""
        family = Stack(task.student).family
        mlp, attention = ("mlp" in self.projections), ("attention" in self.projections)
        paths = {family.out, f"{family.attn}.{MIXER_OUT}"} if attention else set()
        return [
            module
            for block in super().changes(task)
            for path, module in block.named_modules()
            if path in paths or (mlp and path in (family.down, own_map(block)))
        ]

    def over(self, task: RefitTask, sites: Iterable[Site]) -> list[str]:
        """Re-solve; see the class."""
        stack = Stack(task.student)
        attention = "attention" in self.projections
        folds = task.folds
        notes: list[Solved] = []
        skipped: list[int] = []
        tried: set[type[nn.Module]] = set()  # blocks of a class are alike
        for site in sites:
            out = down = None
            if attention:
                out = Projection.at(site, stack.family.out, f"{stack.family.attn}.{MIXER_OUT}")
            if "mlp" in self.projections:
                own = own_map(site.block)
                down = Projection.at(site, stack.family.down, *([] if own is None else [own]))
            if down is not None and type(site.block) not in tried:
                tried.add(type(site.block))
                down.check_last(0)
            found = []
            if out is not None and site.middle is None:
                found += self._parallel(task, site, out, down, folds, notes)
            else:
                mixed: _Mixed | None = None
                if out is not None:
                    mixed, solved = self._attention(task, site, out, folds, notes)
                    found.append(solved)
                if down is not None:
                    found.append(self._mlp(task, site, down, folds, notes, mixed))
                elif mixed is not None:
                    site.outputs = self._behind(task, site, mixed)
            notes += found
            skipped += [] if found else [site.layer]
        return [*summary(notes), *([f"nothing to re-solve in layers {skipped}"] if skipped else [])]

    def _mlp(
        self, task: RefitTask, site: Site, down: Projection, folds: int, notes: Sequence[Solved], mixed: _Mixed | None
    ) -> Solved:
        """The last linear map of the block, all else held fixed; the block runs once."""
        # what the block gives beside the map, and the map's inputs: all that its output with new weights needs
        rest, seen, outputs = (task.streams(self.streams) for _ in range(3))
        systems = [down.sums() for _ in range(folds + 1)]
        for index, target in enumerate(site.targets):
            with mixed.standing_in(site, index) if mixed else _as_it_is():
                inputs, added, output = down.seen(index)
            rest[index], seen[index] = output - added, inputs
            systems[task.fold(index)].add(inputs, target.float() - (output - added).float(), row_weights(target))
        solved, carriers = self._solve(task, site, down, systems, (1.0,), notes)
        for index in range(len(rest)):
            added = carriers[task.fold(index)].of(seen[index])
            outputs[index] = rest[index] + added.to(rest[index].dtype)
        site.outputs = outputs
        return solved

    def _attention(
        self, task: RefitTask, site: Site, out: Projection, folds: int, notes: Sequence[Solved]
    ) -> tuple[_Mixed, Solved]:
        """The output projection of the attention, or of the mixer in its place, towards the state before the MLP."""
        assert site.middle is not None
        seen = task.streams(self.streams)
        systems = [out.sums() for _ in range(folds + 1)]
        for index, goal in enumerate(site.middle):
            inputs, stream = out.entering(index), site.inputs[index]
            seen[index] = inputs
            systems[task.fold(index)].add(inputs, goal.float() - stream.float(), row_weights(goal))
        solved, carriers = self._solve(task, site, out, systems, self._shares, notes)
        return _Mixed(seen, [carriers[task.fold(index)] for index in range(len(seen))]), solved

    def _behind(self, task: RefitTask, site: Site, mixed: _Mixed) -> Streams:
        """The block's outputs, of which the attention need not run again."""
        outputs = task.streams(self.streams)
        for index in range(len(site.inputs)):
            with mixed.standing_in(site, index):
                outputs[index] = site.run(index)
        return outputs

    def _parallel(
        self,
        task: RefitTask,
        site: Site,
        out: Projection,
        down: Projection | None,
        folds: int,
        notes: Sequence[Solved],
    ) -> list[Solved]:
        """Attention and MLP that read one stream: each towards what the block lacks beside all else that it adds.

        One pass tells the inputs of both maps, which do not change with the weights of either.
        """
        reads = {each: task.streams(self.streams) for each in (out, down) if each is not None}
        rest = task.streams(self.streams)
        systems = [out.sums() for _ in range(folds + 1)]
        for index, goal in enumerate(site.targets):
            inputs, added, output, mlp = out.seen_with(down, index)
            systems[task.fold(index)].add(inputs, goal.float() - (output - added).float(), row_weights(goal))
            reads[out][index], rest[index] = inputs, output - added
            if down is not None and mlp is not None:
                reads[down][index], rest[index] = mlp[0], output - added - mlp[1]
        found = []
        for each, shares in ((out, self._shares), (down, (1.0,))):
            if each is None:
                continue
            if each is down:
                systems = [each.sums() for _ in range(folds + 1)]
                for index, goal in enumerate(site.targets):
                    lacks = goal.float() - rest[index].float()
                    systems[task.fold(index)].add(reads[each][index], lacks, row_weights(goal))
            solved, carriers = self._solve(task, site, each, systems, shares, notes)
            found.append(solved)
            for index in range(len(rest)):
                added = carriers[task.fold(index)].of(reads[each][index])
                rest[index] = rest[index] + added.to(rest[index].dtype)
        site.outputs = rest
        return found

    def _solve(
        self,
        task: RefitTask,
        site: Site,
        projection: Projection,
        systems: Sequence[Ridge],
        shares: Sequence[float],
        notes: Sequence[Solved],
    ) -> tuple[Solved, list[Solution]]:
        """Solve a projection and write its weights.

        `systems` are the sums of each fold, and last those of the text held out; `notes` what was solved before: where
        the search for a ridge begins. Returns what was found, and the weights that carry each fold's stream on, those
        of the student last.
        """
        for system in systems:
            task.ranks.add(system.sums)
        checked(systems, f"layer {site.layer}, {projection.path}")
        folds, start = systems[:-1], projection.start()
        # pairs of sums to solve and sums to judge by
        pairs = (
            [(Ridge.total(folds, without=fold), fold) for fold in folds] if len(folds) > 1 else [(folds[0], systems[1])]
        )
        judged = [judge.errors_from(start) for _, judge in pairs]
        before = sum(errors(start, [0.0])[0] for errors in judged)
        whole = Ridge.total(folds)
        tried: dict[int, tuple[float, float, list[Solution]]] = {}

        def error(number: int) -> float:
            """Of a ridge, with its best share; solved once. Infinite where its system is singular, unless all are."""
            if number not in tried:
                try:
                    found = [fit.solution(start, self._ridges[number]) for fit, _ in pairs]
                    final = found[0] if len(folds) == 1 else whole.solution(start, self._ridges[number])
                except ValueError:
                    if number == len(self._ridges) - 1:  # the largest: no other is better
                        raise
                    tried[number] = math.inf, 1.0, []
                    return math.inf
                found.append(final)
                by_share = zip(*(errors(one, shares) for one, errors in zip(found, judged, strict=False)), strict=True)
                tried[number] = (*min(zip(map(sum, by_share), shares, strict=True)), found)
            return tried[number][0]

        number = lowest(error, len(self._ridges), first_ridge(notes, projection.path, self._ridges))
        after, share, found = tried[number]
        rows = max(sum(judge.rows for _, judge in pairs), 1)
        values = (site.layer, projection.path, before / rows)
        if not after < before:
            return Solved(*values, before / rows, 0.0, 0.0, whole.rows, projection.inputs), [start] * len(systems)
        *carriers, final = (one.towards(start, share) for one in found)
        projection.write(final)
        note = Solved(*values, after / rows, self._ridges[number], share, whole.rows, projection.inputs)
        return note, [*carriers, final]


@dataclass(frozen=True)
class _Mixed:
    """What the attention of a block adds to the stream with new weights, so that it need not run again."""

    inputs: Streams
    carriers: Sequence[Solution]

    @contextmanager
    def standing_in(self, site: Site, index: int) -> Iterator[None]:
        """Inside the context the attention returns that, for one batch."""
        attention = site.block.get_submodule(site.stack.family.attn)
        added = self.carriers[index].of(self.inputs[index]) / site.stack.residual_scale

        def forward(*_args: object, **_kwargs: object) -> tuple[Tensor, None]:
            return added, None

        vars(attention)["forward"] = forward
        try:
            yield
        finally:
            del vars(attention)["forward"]


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield

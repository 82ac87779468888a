r"""Values of mixers re-solved in closed form: what is written into the stream is put right with the mixing held fixed.

With mixing weights M_h of query head h, which reads key-value head g, and W_o held fixed, a mixer adds

    sum_g sum_{h reads g} W_o,h W_v,g z_h        z_h = M_h x

to the stream, x what it reads: linear in the values' projection. For one key-value head after the other, the change D_g
that brings the stream nearest to the teacher's solves

    sum_{h,h'} S_hh' D_g C_h'h + l D_g = sum_h W_o,h^T sum_t w_t^2 r_t z_ht^T
    S_hh' = W_o,h^T W_o,h'        C_hh' = sum_t w_t^2 z_ht z_h't^T        r what is missing, the other heads as they are

Where one query head reads g, the left side is a Kronecker product and is solved by two eigenvalue decompositions; where
several do, by conjugate gradients with such a product in front of them. W_v,g is pulled towards what it was with a
strength chosen on text that was not fitted to; where none has a lower error there, the head stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor

from iskd.blocks.ridge import RIDGES, row_weights, whole_float32
from iskd.models import Stack, surgery
from iskd.plan import Convert, Edit, Record
from iskd.refits.base import RefitTask
from iskd.refits.head_sums import HeadSums
from iskd.refits.projections import MIXER_OUT, Projection, check_plain
from iskd.refits.walk import BlockRefit, Site

_CLOSE = 0.05  # relative distance at which mixing by the matrix counts as what the mixer does


@dataclass(frozen=True)
class Values(BlockRefit):
    """Ridge regression of the mixers' value projections towards the teacher's stream, head after head.

    Attributes:
        ridge: strengths to choose from, in units of the mean of the diagonal of the normal equations.

    Source: ours; the normal equations of `refit=output`, one linear map further in
    Needs: mixers whose output is linear in their values: without a norm, gate or short convolution behind them, and
        with a mixing matrix (`sliding`, `window`, `linear_attention`, `hedgehog` and their like); calibration tokens
        (`refit.values.tokens`)
    Costs: two passes of both models' blocks, and for every key-value head a gram matrix of as many times the stream's
        width as query heads read it
    Measured: not measured
    """

    for_mixers: ClassVar[bool] = True
    _: KW_ONLY
    ridge: Sequence[PositiveFloat] | PositiveFloat = RIDGES

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not self._ridges or not all(0 < ridge < float("inf") for ridge in self._ridges):
            raise ValueError(f"refit.values.ridge={self.ridge}: give a positive number, or a list of them")

    @property
    def _ridges(self) -> tuple[float, ...]:
        return (self.ridge,) if isinstance(self.ridge, (int, float)) else tuple(sorted(self.ridge))

    def check(self, stack: Stack, edits: Sequence[Edit] = ()) -> None:
        """Raise ValueError for norms behind what blocks add, and where no mixer's output is linear in its values."""
        check_plain(stack, self.name())
        converts = [edit for edit in edits if isinstance(edit, Convert)]
        if not converts:  # of a step before those that convert
            return
        student = Stack(surgery.rebuild(stack.model, Record(len(stack.layers), tuple(converts)), "meta"))
        reasons = [
            why_not(student.layers[edit.layer].get_submodule(f"{student.family.attn}.mixer")) for edit in converts
        ]
        if all(reasons):
            raise ValueError(f"refit=values: {reasons[0]}; leave values out of refit=[...]")

    @property
    def passes(self) -> float:
        """Two of the student's blocks and one of the teacher's, and about as many products for the gram matrices."""
        return 5.0

    def between(self, stack: Stack) -> bool:
        """Where attention and MLP add one after the other."""
        return stack.sequential

    def chosen(self, task: RefitTask) -> list[int]:
        """Those of the layers in which a mixer stands for the attention."""
        stack, layers = Stack(task.student), list(task.record.layers)
        found = {layer: stack.layers[layers.index(layer)] for layer in super().chosen(task)}
        path = f"{stack.family.attn}.mixer"
        return [layer for layer, block in found.items() if any(name == path for name, _ in block.named_modules())]

    def refit(self, task: RefitTask) -> list[str]:
        """Re-solve; see the class.

        Raises ValueError where no mixer's output is linear in its values, with the reason.
        """
        stack, layers = Stack(task.student), list(task.record.layers)
        chosen = self.chosen(task)
        if not chosen:
            return ["no mixer whose values could be re-solved"]
        unfit: dict[str, list[int]] = {}
        for layer in chosen:
            mixer = stack.layers[layers.index(layer)].get_submodule(f"{stack.family.attn}.mixer")
            if why := why_not(mixer):
                unfit.setdefault(why, []).append(layer)
        told = [f"layers {', '.join(map(str, each))} left as they are: {why}" for why, each in unfit.items()]
        if sum(map(len, unfit.values())) == len(chosen):
            raise ValueError(f"refit=values: {next(iter(unfit))}; leave values out of refit=[...]")
        return [*super().refit(task), *told]

    def over(self, task: RefitTask, sites: Iterable[Site]) -> list[str]:
        """Re-solve the values of every site that has a mixer with such; see the class."""
        found: list[_Solved] = []
        for site in sites:
            mixer = site.submodule(f"{site.stack.family.attn}.mixer")
            out = None if mixer is None else Projection.at(site, f"{site.stack.family.attn}.{MIXER_OUT}")
            if out is not None and not why_not(mixer):
                found += self._solve(task, _Linear(task, site, mixer, out, self.streams), site.layer, found)
        if not found:
            return ["no mixer whose values could be re-solved"]
        before, after = (sum(values) for values in zip(*((one.before, one.after) for one in found), strict=True))
        ridges = sorted({one.ridge for one in found if one.ridge})
        kept = sum(not one.ridge for one in found)
        return [
            f"values of {len({one.layer for one in found})} mixers re-solved: squared error on text left out "
            f"{100 * (1 - after / before) if before else 0:.1f} % lower by head, ridge "
            f"{', '.join(f'{ridge:g}' for ridge in ridges) or '-'}"
            + (f", {kept} of {len(found)} heads left as they were" if kept else "")
        ]

    def _solve(self, task: RefitTask, linear: _Linear, layer: int, before: Sequence[_Solved]) -> list[_Solved]:
        """All heads of one mixer."""
        solved: list[_Solved] = []
        for head in range(linear.heads):
            fit, held = (linear.sums(head, held=held) for held in (False, True))
            for each in (fit, held):
                task.ranks.add(each.flat)
                if not bool(each.flat.isfinite().all()):
                    raise ValueError(
                        f"refit=values: what the mixer of layer {layer} reads is not finite on the calibration text; "
                        "check the teacher's weights, or train in float32 (trainer.precision=32-true)"
                    )
            last = [one.ridge for one in (*before, *solved) if one.ridge]
            tried: dict[int, tuple[float, Tensor]] = {}
            at = self._ridges.index(last[-1]) if last else len(self._ridges) // 2
            while True:  # downhill: the error has one valley
                near = [number for number in (at - 1, at, at + 1) if 0 <= number < len(self._ridges)]
                for number in near:
                    if number not in tried:
                        change = fit.solved(self._ridges[number])
                        tried[number] = (held.error(change), change)
                best = min(near, key=lambda number: tried[number][0])
                if best == at:
                    break
                at = best
            error, change = tried[at]
            start = held.error(torch.zeros_like(change))
            better = error < start
            if better:
                linear.move(head, change)
            solved.append(_Solved(layer, start, error if better else start, self._ridges[at] if better else 0.0))
        return solved


@dataclass(frozen=True)
class _Solved:
    """One key-value head: its layer, the error on text left out before and after, the ridge (0 = left as it was)."""

    layer: int
    before: float
    after: float
    ridge: float


def why_not(mixer: Any) -> str:
    """Why a mixer's output is not linear in its values' projection, by name; "" where it is."""
    name = type(mixer).__name__
    if not hasattr(mixer, "projections") or not getattr(mixer, "exposes_matrix", False):
        return f"{name} has no mixing matrix per head, so its values cannot be re-solved with the mixing held fixed"
    if "v" not in mixer.inherits:
        return f"{name} has no values of its own to re-solve"
    if "v" in mixer.convs:
        return f"{name} has a short convolution behind its values (mixer.conv), which are no linear map of one token"
    if mixer.norm is not None:
        return f"{name} has a norm behind its heads, so its output is not linear in its values"
    if mixer.gate is not None:
        return f"{name} has a gate behind its heads, so its output is no fixed linear map of its values"
    return ""


class _Linear:
    """A mixer at a site as a linear map of its values' weights: what it reads, how it mixes, what is still missing."""

    def __init__(self, task: RefitTask, site: Site, mixer: Any, out: Projection, place: str) -> None:
        self._task, self._v = task, mixer.projections.get_submodule("v_proj")
        self.heads, self._width = mixer.kv_heads, mixer.head_dim
        self._readers = mixer.heads // mixer.kv_heads
        self._reads, self._mixes, self._lacks = (task.streams(place) for _ in range(3))
        self._out_DHK = out.start().weight.float().unflatten(1, (mixer.heads, self._width))
        self._weights = []
        goals = site.targets if site.middle is None else site.middle
        for index, goal in enumerate(goals):
            x, how = _entering(site, mixer, index)
            inputs, added, output = out.seen(index)
            others = site.inputs[index] if site.middle is not None else output - added
            matrix = mixer.matrix(x, **how).float()
            if not index:
                self._check(mixer, matrix, x, inputs, site.layer)
            self._reads[index], self._mixes[index] = x, matrix
            self._lacks[index] = goal.float() - others.float() - added.float()
            self._weights.append(row_weights(goal))

    def _check(self, mixer: Any, matrix: Tensor, x: Tensor, inputs: Tensor, layer: int) -> None:
        """Raise ValueError unless mixing values by the matrix gives what goes into the output projection."""
        v = self._v(x).unflatten(-1, (self.heads, self._width)).repeat_interleave(self._readers, 2)
        with whole_float32(v.device):
            mixed = torch.einsum("bhts,bshk->bthk", matrix, v.float()).flatten(2)
        off = float((mixed - inputs.float()).norm() / inputs.float().norm().clamp_min(1e-12))
        if not off < _CLOSE:
            raise ValueError(
                f"refit=values: {type(mixer).__name__} of layer {layer} does not give its mixed values to its output "
                "projection as they are, so it is not linear in them; leave values out of refit=[...]"
            )

    def sums(self, head: int, *, held: bool) -> HeadSums:
        """What this rank's windows say of one key-value head, on text that is fitted to or held out."""
        readers = slice(head * self._readers, (head + 1) * self._readers)
        out_RDK = self._out_DHK[:, readers].transpose(0, 1)
        sums = HeadSums(out_RDK.double(), self._features)
        for index, weights in enumerate(self._weights):
            if (self._task.fold(index) < 0) is held:
                lacking = self._lacks[index] * weights
                with whole_float32(lacking.device):
                    z = (self._mixes[index][:, readers] @ self._read(index)[:, None]).transpose(0, 1) * weights
                    wanted = torch.einsum("btd,rdk->rbtk", lacking, out_RDK)
                sums.add(z.flatten(1, 2), wanted.flatten(1, 2), lacking.square().sum(dtype=torch.float64))
        return sums

    @property
    def _features(self) -> int:
        return int(self._v.in_features) + (self._v.bias is not None)

    def _read(self, index: int) -> Tensor:
        """What the values' projection reads [B, T, F], with the one of its bias."""
        x = self._reads[index].float()
        return x if self._v.bias is None else torch.cat([x, torch.ones_like(x[..., :1])], -1)

    @torch.no_grad()
    def move(self, head: int, change_KF: Tensor) -> None:
        """Add a change to a head's weights, and take from what is missing what it adds to the stream."""
        rows = slice(head * self._width, (head + 1) * self._width)
        readers = slice(head * self._readers, (head + 1) * self._readers)
        self._v.weight[rows] += change_KF[:, : self._v.in_features].to(self._v.weight.dtype)
        if self._v.bias is not None:
            self._v.bias[rows] += change_KF[:, -1].to(self._v.bias.dtype)
        for index in range(len(self._weights)):
            with whole_float32(change_KF.device):
                v = self._read(index) @ change_KF.float().T
                mixed = torch.einsum("bhts,bsk->bthk", self._mixes[index][:, readers], v)
                added = torch.einsum("bthk,dhk->btd", mixed, self._out_DHK[:, readers])
            self._lacks[index] = self._lacks[index] - added


def _entering(site: Site, mixer: Any, index: int) -> tuple[Tensor, dict[str, Any]]:
    """What a mixer is called with in a pass on a batch: the normed stream [B, T, D], its mask and its positions."""
    heard: list[tuple[Tensor, dict[str, Any]]] = []

    def hook(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        heard.append((args[0], {key: kwargs.get(key) for key in ("mask", "positions")}))

    handle = mixer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        site.run(index)
    finally:
        handle.remove()
    return heard[0]

"""Prune&Comp: what a removed layer would have added to the size of the stream is folded into the weights below it.

One scalar for each removed layer. Norms at the entrance of every block do not notice a larger stream; what notices it
is put right: all that writes to the stream below the cut grows by the scalar, and where the head is the embedding, the
gain of the final norm shrinks by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from iskd.models import Stack
from iskd.models.block_calls import BlockCalls
from iskd.models.capture import states_after
from iskd.plan import Edit, Remove
from iskd.plan.edits import REMOVALS
from iskd.refits.base import Refit, RefitTask
from iskd.refits.walk import submodule_at

STATISTICS = ("mean_abs", "norm")
_COMPACT = (
    "refit=magnitude scales what attention and MLP add to the stream, and the block at layer {} is a compact or "
    "converted one, which adds in a way of its own: use refit=output"
)


@dataclass(frozen=True)
class Magnitude(Refit):
    """One scalar for each removed layer, from the sizes of the teacher's states before and after it.

    Attributes:
        statistic: `mean_abs`, the published one: the mean over channels of the ratio of their mean absolute values,
            which a position with a huge norm decides; `norm`: the median over tokens of the ratio of their norms.

    Source: Prune&Comp (arXiv 2507.18212, section 3)
    Needs: calibration tokens (`refit.magnitude.tokens`); removals, no compact block below them, and nothing afterwards
        that aims at the teacher's states (other refits, losses on their size, fits); a run that goes on from such a
        student cannot know
    Costs: one pass of the teacher's blocks
    Measured: not measured
    """

    resizes: ClassVar[bool] = True
    _: KW_ONLY
    tokens: PositiveInt = 8_192
    statistic: str = "mean_abs"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.statistic not in STATISTICS:
            raise ValueError(f"refit.magnitude.statistic={self.statistic!r}: choose {' or '.join(STATISTICS)}")

    @property
    def passes(self) -> float:
        """One of the teacher."""
        return 1.0

    def check(self, stack: Stack, edits: Sequence[Edit] = ()) -> None:
        """Raise ValueError for blocks that read the stream without a norm."""
        if not stack.reads_norms:
            raise ValueError(
                f"refit=magnitude makes the stream larger, and blocks of {stack.config.model_type} read it without a "
                "norm in front of them: use refit=local"
            )

    def refit(self, task: RefitTask) -> list[str]:
        """Scale; see the class."""
        removed = sorted(edit.layer for edit in task.edits if isinstance(edit, Remove))
        if not removed:
            merged = any(isinstance(edit, REMOVALS) for edit in task.edits)
            return [f"no layer was {'removed but by a merge' if merged else 'removed'}: nothing to scale"]
        stack = Stack(task.student)
        self.check(stack)
        for layer, block in zip(task.record.layers, stack.layers, strict=True):
            if layer < removed[-1] and not _scales(stack, block):  # which layers these are turns out in a run
                return [f"nothing was scaled: {_COMPACT.format(layer)}"]
        scalars = _scalars(task, removed, self.statistic)
        for layer, scalar in scalars.items():
            _fold(task, layer, scalar)
        return [f"below layer {layer} all is {scalar:.3f} times as large" for layer, scalar in scalars.items()]


def _scales(stack: Stack, block: nn.Module) -> bool:
    """Whether what a block adds is as large as two of its projections."""
    return all(submodule_at(block, path) is not None for path in (stack.family.down, stack.family.out))


def _scalars(task: RefitTask, removed: list[int], statistic: str) -> dict[int, float]:
    """By removed layer, how many times larger the teacher's states are behind it."""
    stack = Stack(task.teacher)
    wanted = {layer for number in removed for layer in (number - 1, number) if layer >= 0}
    sums: dict[int, Tensor] = {}  # mean_abs: [2, D] sums before and after
    ratios: dict[int, list[Tensor]] = {layer: [] for layer in removed}
    for windows in task.fit:
        batch = windows.to(task.device)
        states = states_after(stack, range(task.record.num_layers), wanted, batch)
        if removed[0] == 0:
            states[-1] = BlockCalls(stack, batch).embedded
        for layer in removed:
            before, after = states[layer - 1].float(), states[layer].float()
            if statistic == "norm":
                # position 0 often holds a norm of its own kind (the attention sink)
                ratios[layer].append((after.norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-6))[:, 1:].flatten())
            else:
                found = torch.stack([before, after]).abs().sum((1, 2), dtype=torch.float64)
                sums[layer] = sums[layer] + found if layer in sums else found
    if statistic == "norm":
        # of all ranks' tokens: a mean of medians would be another number for every number of processes
        every = [torch.cat(task.ranks.gather(torch.cat(ratios[layer]).cpu())) for layer in removed]
        shares = torch.stack([one.median() for one in every]).double()
    else:
        for layer in removed:
            task.ranks.add(sums[layer])
        shares = torch.stack([(sums[layer][1] / sums[layer][0].clamp_min(1e-12)).mean() for layer in removed])
    if not (shares.isfinite() & (shares > 0)).all():
        raise ValueError("refit=magnitude: the teacher's states are not finite on the calibration text")
    return dict(zip(removed, shares.tolist(), strict=True))


@torch.no_grad()
def _fold(task: RefitTask, layer: int, scalar: float) -> None:
    """Make everything below a cut `scalar` times as large, and the logits what they were."""
    stack, student = Stack(task.student), task.student
    family, base = stack.family, stack.base
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    table = embedding.get_parameter("weight")
    table.mul_(scalar)
    if family.positions:
        base.get_submodule(family.positions).get_parameter("weight").mul_(scalar)
    if head is not None and head.get_parameter("weight") is table:
        norm = base.get_submodule(family.norm)
        _scale_norm(norm, 1 / scalar, stack)
    for number, block in zip(task.record.layers, stack.layers, strict=True):
        if number < layer:
            for path in family.post_norms:
                _scale_norm(block.get_submodule(path), scalar, stack)
            for path in () if family.post_norms else (family.out, family.down):
                for parameter in block.get_submodule(path).parameters():
                    parameter.mul_(scalar)


def _scale_norm(norm: nn.Module, by: float, stack: Stack) -> None:
    """Make what a norm gives so many times as large."""
    gain = norm.get_parameter("weight")
    more = 1.0 if stack.config.model_type.startswith("gemma") else 0.0  # Gemma's gain is 1 + weight
    gain.copy_((gain + more) * by - more)
    bias: Tensor | None = getattr(norm, "bias", None)
    if bias is not None:
        bias.mul_(by)

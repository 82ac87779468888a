"""A linear map inside a block of the walk: what goes in, what comes out, and new weights for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iskd.blocks import Ridge
from iskd.blocks.ridge import Solution
from iskd.models import Stack
from iskd.models.projections import weight_of
from iskd.refits.walk import Site

MIXER_OUT = "mixer.projections.o_proj"
"""Where the output projection of a mixer is, in the module that stands for an attention."""
ENOUGH = 8
"""Rows for each input with which a fit needs little of its ridge."""
_BEHIND = (
    "{path} of layer {layer}: what it returns is not added to the stream as it is (a norm stands behind it), so it "
    "cannot be re-solved in closed form: use refit=local"
)


def check_plain(stack: Stack, name: str) -> None:
    """Raise ValueError where a refit of a name could re-solve no projection of a model's blocks."""
    if not stack.adds_plainly:
        raise ValueError(
            f"refit={name} re-solves what is added to the stream in closed form, and in this model "
            f"({stack.config.model_type}) a norm stands behind it: use refit=local"
        )


def own_map(block: nn.Module) -> str | None:
    """Path of the last linear map of a compact block that says which one it is, in the module that hosts it."""
    name = getattr(getattr(block, "block", None), "adds", None)
    return None if name is None else f"block.{name}"


class _Entered(Exception):
    """Ends a block's pass whose rest nobody needs."""


class Projection:
    """A linear map that adds to the stream, in the block where the walk stands.

    Attributes:
        path: where it is in the block.
        module: the map itself; weights as its family stores them.
    """

    def __init__(self, site: Site, path: str, module: nn.Module) -> None:
        self.path, self.module, self._site = path, module, site

    @classmethod
    def at(cls, site: Site, *paths: str) -> Projection | None:
        """The first of some paths that the block has; None where a compact block has none of them.

        Raises ValueError in a model whose blocks have norms behind what they add, or behind the sum.
        """
        if not site.stack.adds_plainly:
            raise ValueError(_BEHIND.format(path=paths[0], layer=site.layer))
        for path in paths:
            module = site.submodule(path)
            if module is not None:
                return cls(site, path, module)
        return None

    @property
    def inputs(self) -> int:
        """Input features F."""
        return weight_of(self.module).shape[1]

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight [D, F] and bias [D], or None."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return weight_of(self.module), bias

    def sums(self) -> Ridge:
        """Empty normal equations of the map."""
        weight, bias = self.weights
        return Ridge(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)

    @property
    def _scale(self) -> float:
        """What its output is multiplied by on its way into the stream (Granite); compact blocks have no such factor."""
        return 1.0 if self.path == own_map(self._site.block) else self._site.stack.residual_scale

    def start(self) -> Solution:
        """The weights that it has, times what its output is multiplied by on its way into the stream (Granite)."""
        weight, bias = self.weights
        return Solution(self._scale * weight.double(), None if bias is None else self._scale * bias.double())

    def seen(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Its inputs [B, T, F] and what it adds [B, T, D] in a pass on a batch, and the block's output [B, T, D]."""
        inputs, added, output, _ = self.seen_with(None, index)
        return inputs, added, output

    def seen_with(
        self, other: Projection | None, index: int
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """`seen`, and in the same pass inputs and addend of another map of the block."""
        heard: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[Tensor, Tensor]] = []
        handles = [
            map_.module.register_forward_hook(lambda _module, args, output, into=into: into.append((args[0], output)))
            for map_, into in ((self, heard), (other, others))
            if map_ is not None
        ]
        try:
            output = self._site.run(index)
        finally:
            for handle in handles:
                handle.remove()
        shape = output.shape[:-1]  # OPT's MLP sees one long row of tokens
        found = [(inputs.view(*shape, -1), self._scale * added.view(*shape, -1)) for inputs, added in (*heard, *others)]
        return *found[0], output, found[1] if others else None

    def entering(self, index: int) -> Tensor:
        """Its inputs [B, T, F] in a pass on a batch, which ends there."""
        inputs: list[Tensor] = []

        def enough(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            raise _Entered

        handle = self.module.register_forward_pre_hook(enough)
        try:
            self._site.run(index)
        except _Entered:
            pass
        finally:
            handle.remove()
        return inputs[0]

    def check_last(self, index: int) -> None:
        """Raise ValueError unless what it returns is added to the block's output as it is (not so before a norm)."""
        nudge = torch.zeros(self.weights[0].shape[0], device=self.weights[0].device)
        plain = self._site.run(index)
        nudge[:] = plain.float().square().mean().sqrt()
        handle = self.module.register_forward_hook(lambda _module, _args, output: output + nudge)
        try:
            moved = self._site.run(index)
        finally:
            handle.remove()
        if not bool(moved.isfinite().all()):
            return  # `checked` says so
        nudge *= self._scale
        if not torch.allclose((moved - plain).float(), nudge.expand_as(plain), rtol=0.05):
            raise ValueError(_BEHIND.format(path=self.path, layer=self._site.layer))

    @torch.no_grad()
    def write(self, solution: Solution) -> None:
        """Give it the weights and the bias that add what a solution adds."""
        weight, bias = self.weights
        weight.copy_(solution.weight / self._scale)
        if solution.bias is not None and bias is not None:
            bias.copy_(solution.bias / self._scale)


def few(rows: int, features: int, what: str, key: str, *, ridge: bool = True) -> list[str]:
    """A sentence where a fit has fewer than `ENOUGH` rows for each of its inputs; `key` says how many it asks for."""
    if rows >= ENOUGH * features:
        return []
    return [
        f"{rows} calibration tokens for {features} inputs of {what}: {'the ridge keeps this harmless, but ' * ridge}"
        f"give {key}={ENOUGH * features} or more, of as much calibration text (data.calibration_fraction)"
    ]


def checked(sums: Sequence[Ridge], what: str) -> None:
    """Raise ValueError where sums are not finite: a block has met numbers that no fit can mend."""
    if not all(bool(one.sums.isfinite().all()) for one in sums):
        raise ValueError(
            f"{what}: the inputs or the teacher's states are not finite on the calibration text; check the teacher's "
            "weights, or train in float32 (trainer.precision=32-true)"
        )

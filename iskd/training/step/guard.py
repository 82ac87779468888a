"""Skips optimizer steps whose loss or gradient is not finite, without making the host wait for the device.

Before AdamW runs, the device knows whether all numbers are finite; the host would know only after the backward pass.
So on a device that computes while the host goes on, the decision stays there: fused AdamW takes `found_inf` (the flag
that torch's GradScaler sets) and then leaves weights, moments and step counts as they are. The host reads the flag one
step later, when the device has long answered, or at once where somebody needs it (`StepGuard.settle`):

    host     forward n | backward n | AdamW n | reads n-1 | forward n+1 | ...
    device        ... n-1 | forward n | backward n | AdamW n, or nothing | forward n+1 ...

On a CPU, and for an AdamW without that flag (optim.fused=false), the host decides itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iskd.system import Ranks
from iskd.system.faults import Verdict


@dataclass(frozen=True)
class _Asked:
    """A step's flags on their way to the host."""

    number: int
    ahead: bool  # whether the host went on without the answer
    flags: Tensor  # [2] on the host: not finite, stop
    copied: torch.cuda.Event | None  # the copy from the device is done

    def read(self) -> Verdict:
        if self.copied is not None:
            self.copied.synchronize()
        skipped, stopping = (flag > 0 for flag in self.flags.tolist())
        return Verdict(self.number, skipped, stopping)


class StepGuard:
    """Decides which optimizer steps are skipped, on every rank alike.

    Args:
        ranks: the processes of the run.

    Attributes:
        ahead: whether the decision stays on the device; None = where it is a CUDA device and the optimizer can.
    """

    ahead: bool | None = None

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._asked: list[_Asked] = []

    def judge(self, number: int, optimizer: torch.optim.Optimizer, finite: Tensor, *, stop: bool = False) -> None:
        """Make the coming update of `optimizer` change nothing where a rank's loss or gradient is not finite.

        A collective. All ranks skip when one has to: its loss may be infinite while the summed gradient is not.

        Args:
            number: of the optimizer step, for the verdict.
            optimizer: fused AdamW may be told on the device; any other loses its gradients, without which it does
                nothing.
            finite: whether loss and gradient of this rank are, a scalar on their device.
            stop: whether this rank was asked to end the run.
        """
        flags = torch.full((2,), float(stop), device=finite.device)  # a fill, not a copy from the host, which waits
        flags[0] = ~finite
        # a rank that skipped alone would have other weights from then on
        flags = self._ranks.highest(flags)
        ahead = _can_be_told(optimizer, finite.device) if self.ahead is None else self.ahead
        # fused kernels read it on the device; where it is 1 they write nothing, and the step is not counted
        optimizer.found_inf = flags[0] if ahead else None  # type: ignore[attr-defined]
        copy, copied = flags.to("cpu", non_blocking=True), None
        if flags.is_cuda:
            # the copy is done when the device comes to this event; only `_Asked.read` waits for it
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(flags.device))
        self._asked.append(_Asked(number, ahead, copy, copied))
        if not ahead and self._asked[-1].read().skipped:
            optimizer.zero_grad(set_to_none=True)

    def settle(self, *, now: bool) -> list[Verdict]:
        """Hand out the verdicts on past steps, each once, oldest first.

        All with `now`; else without the latest, where the host went on ahead of its answer, so that nothing waits.
        A verdict that asks the run to stop brings all: what is written then must have counted every step.
        """
        # the newest alone would have to be waited for: an older one is a whole step ago
        open_ = [asked for asked in self._asked[-1:] if asked.ahead and not now]
        told = [asked.read() for asked in self._asked[: len(self._asked) - len(open_)]]
        if any(verdict.stopping for verdict in told):
            told, open_ = [*told, *(asked.read() for asked in open_)], []
        self._asked = open_
        return told


def _can_be_told(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the host may go on before it knows, and the optimizer takes `found_inf`, as fused ones do."""
    return device.type == "cuda" and bool(optimizer.defaults.get("fused"))

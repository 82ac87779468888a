"""How a training step runs its blocks: as they are, recomputed in the backward pass, or compiled, one by one.

    recompute   a block of the student keeps its input alone; its backward pass runs it again first
                (gradient checkpointing, arXiv 1604.06174), under the same autocast and random numbers
    compile     a block is one `torch.compile` unit, of the student as of the teacher; blocks made alike share the code

Both hold during the passes of a step and leave nothing on a model: they stand before the `forward` of each block that
is in the stack then. So a block that an edit brings is taken up by the next step and a removed one is forgotten; names
of weights, copies, checkpoints and exports are those of a plain model; fits, scores, validation and the stages that
align layers run without. Hooks on blocks, those of `iskd.capture` and of FSDP2 among them, stay outside: they run once.

Frozen blocks below the first trainable one keep nothing for a backward pass, which does not come to them, so they are
not run again. The backends of `compile` other than `eager` and `aot_eager` want a compiler on the machine (inductor: of
C++ on a CPU, Triton on a GPU). It orders sums anew: an untouched student has then a KL of about 0, not exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from iskd.arch import Stack

Forward = Callable[..., Any]

# of one function, whichever block it belongs to: with and without gradients, frozen, edited in several ways and sizes
_VARIANTS = 64


class BlockRunner:
    """Runs the blocks of a step.

    Args:
        recompute: recompute the student's blocks in the backward pass.
        compile: compile the blocks of both models: True (torch's default backend), or the name of a backend.

    Attributes:
        backend: of `compile`, or None.
    """

    def __init__(self, *, recompute: bool = False, compile: bool | str = False) -> None:
        self.recompute = recompute
        self.backend = "inductor" if compile is True else compile or None
        self._compiled: dict[nn.Module, Forward] = {}

    @contextmanager
    def running(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[None]:
        """Inside the context the blocks that stand in both models now run as asked for."""
        ours = list(Stack(student).layers) if self.recompute or self.backend is not None else []
        theirs = list(Stack(teacher).layers) if self.backend is not None else []
        with ExitStack() as undo:
            if self.backend is not None:
                # beyond its limit torch runs a block uncompiled, without an error
                settings: Any = torch.compiler.config
                undo.enter_context(settings.patch(recompile_limit=_VARIANTS))
                self._compile([*ours, *theirs])
            for block in ours:
                run = self._compiled.get(block, block.forward)
                undo.enter_context(_standing_before(block, partial(_recomputed, run) if self.recompute else run))
            for block in theirs:
                undo.enter_context(_standing_before(block, self._compiled[block]))
            yield

    def _compile(self, blocks: list[nn.Module]) -> None:
        """Have every block's compiled function at hand, and none of a block that is gone."""
        known, backend = self._compiled, self.backend
        assert backend is not None
        self._compiled = {
            block: known[block] if block in known else torch.compile(block.forward, backend=backend) for block in blocks
        }


def _recomputed(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Call a block so that the backward pass calls it again, where there will be one."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def _standing_before(block: nn.Module, forward: Forward) -> Iterator[None]:
    """Inside the context a call of the block calls `forward` in the place of its own."""
    own = vars(block).get("forward")  # of the object and not of its class: others do this too
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        del vars(block)["forward"]
        if own is not None:
            vars(block)["forward"] = own

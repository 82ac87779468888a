"""Gradient checkpointing and `torch.compile` of the blocks of a training step, one by one, while the step runs.

    recompute   a block of the student keeps its input alone; its backward pass runs it again first
                (gradient checkpointing, arXiv 1604.06174), under the same autocast and random numbers. "selective": it
                keeps what linear maps return too, and fused attention without dropout, and runs only the rest again:
                norms, activations, rotations, casts, a mixer's products between tokens (selective activation
                recomputation, arXiv 2205.05198, section 5). A block must do the same operations at every call: torch
                finds what was kept by their order, and one that makes a product only once has wrong gradients
    compile     a block is one `torch.compile` unit, of the student as of the teacher; blocks made alike share the code

Both hold during the passes of a step and leave nothing on a model: they stand before the `forward` of each block that
is in the stack then. So a block that an edit brings is taken up by the next step and a removed one is forgotten; names
of weights, copies, checkpoints and exports are those of a plain model; fits, scores, validation and the stages that
align layers run without. Hooks on blocks, those of `iskd.models.capture` and of FSDP2 among them, stay outside: they
run once.

Frozen blocks below the first trainable one keep nothing for a backward pass, which does not come to them, so they are
not run again. The backends of `compile` other than `eager` and `aot_eager` want a compiler on the machine (inductor: of
C++ on a CPU, Triton on a GPU). It orders sums anew: an untouched student has then a KL of about 0, not exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from iskd.models import Stack

Forward = Callable[..., Any]

# of one function, whichever block it belongs to: with and without gradients, frozen, edited in several ways and sizes
_VARIANTS = 64

# What a selective recomputation keeps: dear to compute and small. Batched products (`bmm`) are not among them: those of
# attention without a fused kernel return [T, T] matrices.
_KEPT = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}

Recompute = bool | Literal["selective"]


class BlockRunner:
    """Switches the blocks of a step to gradient checkpointing, to compiled code, or to both.

    Args:
        recompute: recompute the student's blocks in the backward pass; "selective" = but for their products.
        compile: compile the blocks of both models: True (torch's default backend), or the name of a backend.

    Attributes:
        backend: of `compile`, or None.

    Raises:
        ValueError: compiled blocks are to be recomputed selectively; nothing inside them can be told apart.
    """

    def __init__(self, *, recompute: Recompute = False, compile: bool | str = False) -> None:
        if recompute == "selective" and compile:
            raise ValueError(
                "run.gradient_checkpointing=selective and run.compile do not go together: a compiled block decides "
                "itself what it keeps; take one of them, or run.gradient_checkpointing=true"
            )
        self.recompute: Recompute = recompute
        self.backend = "inductor" if compile is True else compile or None
        self._compiled: dict[nn.Module, Forward] = {}

    @contextmanager
    def running(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[None]:
        """Inside the context the blocks that stand in both models now run as asked for."""
        # the teacher's blocks are at most compiled: without gradients there is nothing to recompute
        ours = list(Stack(student).layers) if self.recompute or self.backend is not None else []
        theirs = list(Stack(teacher).layers) if self.backend is not None else []
        if self.recompute == "selective":
            # a weight's cast from an earlier pass would be missing among what this one did, and torch goes by that
            torch.clear_autocast_cache()
        with ExitStack() as undo:
            if self.backend is not None:
                # beyond its limit torch runs a block uncompiled, without an error
                settings: Any = torch.compiler.config
                undo.enter_context(settings.patch(recompile_limit=_VARIANTS))
                self._compile([*ours, *theirs])
            # recomputation around the compiled block: its second run is compiled too
            for block in ours:
                run = self._compiled.get(block, block.forward)
                undo.enter_context(_standing_before(block, self._recomputing(run)))
            for block in theirs:
                undo.enter_context(_standing_before(block, self._compiled[block]))
            yield

    def _recomputing(self, forward: Forward) -> Forward:
        """A block's `forward` so that its backward pass calls it again, where that is asked for."""
        if not self.recompute:
            return forward
        kept = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
        return partial(_recomputed, forward, kept if self.recompute == "selective" else {})

    def _compile(self, blocks: list[nn.Module]) -> None:
        """Have every block's compiled function at hand, and none of a block that is gone."""
        known, backend = self._compiled, self.backend
        assert backend is not None
        # nothing stands before `block.forward` yet; torch compiles it when it is first called
        self._compiled = {
            block: known[block] if block in known else torch.compile(block.forward, backend=backend) for block in blocks
        }


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether an operator's result is kept; not where it draws random numbers, which what follows it counts on."""
    if operator not in _KEPT:
        return CheckpointPolicy.PREFER_RECOMPUTE
    # arguments by name, whether they were passed by place or by name: the attention kernels differ in their order
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
    return CheckpointPolicy.PREFER_RECOMPUTE if given.get("dropout_p") else CheckpointPolicy.MUST_SAVE


def _recomputed(forward: Forward, options: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call a block so that the backward pass calls it again, where there will be one."""
    # without gradients nothing is kept anyway
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


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

"""Layer by layer towards the teacher (MOHAWK, arXiv 2408.10189; arXiv 2504.14366), each layer on its own.

A layer of the student is given what the teacher's own layer was given, and learns what that made of it:

    matrix        mean over B, H of || M - A ||_F               M: mixing matrix, A: softmax attention [B, H, T, T]
    mixer_output  mean over B, T, D of (mixer(x) - attention(x))^2             after the output projection
    hidden        mean over B, T of || block(h)_t - h'_t ||_2                  before the final norm

The published code compares the last block with the teacher's state after its final norm; here it is the one before.

No gradient crosses layers. So each layer's graph is built, differentiated and freed while the teacher's pass goes on
to the next one: the memory of one layer, and no teacher's state is kept. The loss is the sum over the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from iskd.models import Stack, sharding
from iskd.models.capture import Call, attention_weights, follow, state_of
from iskd.models.hosting import HostedBlock, HostedMixer, positions_of
from iskd.plan import Record, Stage
from iskd.training.step.spans import StepSpan, span

MATRIX_TOKENS = 512
"""Windows are cut into equal pieces of at most so many tokens where matrices [T, T] are compared."""

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Aligned:
    """What one step gives: the sum over the layers with its gradient, and each layer's detached value."""

    loss: Tensor
    by_layer: dict[int, Tensor]


@dataclass(frozen=True)
class _Layer:
    """A layer in training: the student's module, its parameters, where the teacher's counterpart begins and ends."""

    number: int
    module: nn.Module
    parameters: list[nn.Parameter]
    span: tuple[nn.Module, nn.Module]


@span(StepSpan.ALIGNMENT)
def align(
    objective: str, student: PreTrainedModel, teacher: PreTrainedModel, record: Record, input_ids: Tensor
) -> Aligned:
    """One step on windows [B, T]: a pure function of weights and batch; the teacher runs once, without its head.

    Every layer whose parameters train is compared: with `hidden` its block, otherwise its mixer.

    Raises:
        ValueError: the student is in shards, no layer trains, or a mixing matrix does not fit the attention's.
    """
    check_whole(student, objective)
    layers = _layers(objective, student, teacher, record)
    if not layers:
        raise ValueError(f"objective={objective} compares layers that train, and none does; check schedule.train")
    parameters = [p for layer in layers for p in layer.parameters]

    def walk() -> tuple[Tensor, Gradients]:
        return _walk(objective, layers, Stack(teacher), input_ids)

    loss, values = _LayerByLayer.apply(walk, *parameters)  # type: ignore[no-untyped-call]
    return Aligned(loss, {layer.number: value for layer, value in zip(layers, values.unbind(), strict=True)})


class _LayerByLayer(torch.autograd.Function):
    """Differentiable shell of `_walk`: to autograd, and to DDP's hooks, one operation on all parameters."""

    @staticmethod
    def forward(ctx: Any, walk: Callable[[], tuple[Tensor, Gradients]], *parameters: nn.Parameter) -> Any:
        values, ctx.gradients = walk()
        ctx.mark_non_differentiable(values)
        return values.sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # nobody else needs them while they become .grad
        return None, *(None if gradient is None else gradient * factor for gradient in gradients)


def _walk(objective: str, layers: Sequence[_Layer], teacher: Stack, input_ids: Tensor) -> tuple[Tensor, Gradients]:
    """Values [layers] and the gradient of each layer's parameters, in order; None where a parameter is not reached."""
    values: list[Tensor] = []
    gradients: Gradients = []

    def visit(index: int, call: Call, output: Any) -> None:
        layer = layers[index]
        with torch.enable_grad():
            value = _distance(objective, layer.module, call, output)
        # autocast would round what the backward pass multiplies in fp32
        with torch.autocast(input_ids.device.type, enabled=False):
            gradients.extend(torch.autograd.grad(value, layer.parameters, allow_unused=True))
        values.append(value.detach())

    spans = [layer.span for layer in layers]
    if objective != "matrix":
        follow(teacher, input_ids, spans, visit)
    else:
        with attention_weights(teacher):
            follow(teacher, pieces(input_ids), spans, visit)
    return torch.stack(values), gradients


def pieces(input_ids: Tensor) -> Tensor:
    """Windows [B, T] as more and shorter ones of equal length, at most `MATRIX_TOKENS`; a rest of T is left out."""
    tokens = input_ids.shape[1]
    number = -(-tokens // MATRIX_TOKENS)
    return input_ids[:, : tokens // number * number].reshape(-1, tokens // number)


def _distance(objective: str, module: nn.Module, call: Call, output: Any) -> Tensor:
    """How far the student's layer is from what the teacher's made of the same call; a scalar, at least float32."""
    if objective == "matrix":
        ours, theirs = matrix_of(module, call), output[1]
        if ours.shape != theirs.shape:
            raise ValueError(_misfit(module, ours.shape[1], theirs.shape[1]))
    else:
        ours, theirs = state_of(module(*call.args, **call.kwargs)), state_of(output)
    with torch.autocast(ours.device.type, enabled=False):
        wide = torch.promote_types(ours.dtype, torch.float32)
        difference = ours.to(wide) - theirs.to(wide)
        if objective == "mixer_output":
            return difference.square().mean()
        norms: Tensor = torch.linalg.vector_norm(difference, dim=(-2, -1) if objective == "matrix" else -1)
        return norms.mean()


def matrix_of(module: nn.Module, call: Call) -> Tensor:
    """The mixing matrix [B, H, T, T] of a hosted mixer for the call that its attention was given."""
    assert isinstance(module, HostedMixer)
    seen = {"mask": call.kwargs.get("attention_mask"), "positions": positions_of(call.kwargs)}
    matrix: Tensor = cast(Any, module.mixer).matrix(call.stream, **seen)
    return matrix


# ---- what is compared ------------------------------------------------------------------------------------------------


def check(model: PreTrainedModel, record: Record, stage: Stage) -> None:
    """Refuse a stage whose objective cannot work on a student, which may lie on the meta device.

    Args:
        model: the student after the stage's edits.
        record: its record.
        stage: any stage.

    Raises:
        ValueError: no layer is converted, or matrices are to be compared and a mixer has none or has other heads.
    """
    if stage.objective not in ("matrix", "mixer_output"):
        return
    mixers = mixers_of(model, record)
    if not mixers:
        raise ValueError(
            f"stage {stage.name!r} has objective={stage.objective}, and no layer is converted by then; use edit=convert"
        )
    for layer, hosted in mixers.items() if stage.objective == "matrix" else ():
        if not getattr(hosted.mixer, "exposes_matrix", False):
            raise ValueError(
                f"layer {layer}: {type(hosted.mixer).__name__} has no mixing matrix per head to compare with the "
                "attention's; use schedule.mixers=mixer_output, or null to leave the stage out"
            )
        heads, wanted = getattr(hosted.mixer, "heads", None), Stack(model).dims.heads
        if heads not in (None, wanted):
            raise ValueError(f"layer {layer}: {_misfit(hosted, heads, wanted)}")


def _misfit(module: nn.Module, heads: int, wanted: int) -> str:
    name = type(module.mixer if isinstance(module, HostedMixer) else module).__name__
    return (
        f"{name} mixes with {heads} heads and the teacher's attention with {wanted}, so their matrices cannot be "
        "compared; use schedule.mixers=mixer_output, or as many heads (mixer.heads=null)"
    )


def check_whole(student: PreTrainedModel, *objectives: str) -> None:
    """Raise ValueError for the alignment of a student in shards: here blocks run outside the pass that gathers them."""
    if sharding.is_sharded(student) and set(objectives) - {"loss"}:
        raise ValueError(
            "trainer=fsdp gathers a block's weights inside a pass of the whole student, and alignment runs the blocks "
            "one by one: use trainer=ddp, or schedule.mixers=null schedule.hidden=false"
        )


def mixers_of(model: PreTrainedModel, record: Record) -> dict[int, HostedMixer]:
    """The mixer of every converted layer that still stands."""
    stack = Stack(model)
    blocks = zip(record.layers, stack.layers, strict=True)
    # a compact block without an attention of its own cannot be converted
    modules = {i: block.get_submodule(stack.family.attn) for i, block in blocks if not isinstance(block, HostedBlock)}
    return {layer: module for layer, module in modules.items() if isinstance(module, HostedMixer)}


def _layers(objective: str, student: PreTrainedModel, teacher: PreTrainedModel, record: Record) -> list[_Layer]:
    """The layers that train, in stack order, each with the teacher's counterpart."""
    original = Stack(teacher)
    modules: dict[int, nn.Module]
    if objective == "hidden":
        modules = dict(zip(record.layers, Stack(student).layers, strict=True))
        # below a gap the block learns the teacher's state above it
        spans = {i: (original.layers[i], original.layers[record.state_after(i)]) for i in modules}
    else:
        modules = dict(mixers_of(student, record))
        attentions = {i: original.layers[i].get_submodule(original.family.attn) for i in modules}
        spans = {i: (attention, attention) for i, attention in attentions.items()}
    trained = {i: [p for p in module.parameters() if p.requires_grad] for i, module in modules.items()}
    return [_Layer(i, module, trained[i], spans[i]) for i, module in modules.items() if trained[i]]

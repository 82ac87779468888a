"""FSDP2 (`fully_shard`): a student in shards that is edited while it trains.

One FSDP group per block and one for the rest of the model (embedding, final norm, head: the root). The root stays whole
between its forward and the end of the backward pass, which is what lets the losses read the head's weight. An edit
takes the blocks it touches out as plain ones with whole weights (`thaw`), changes them as on one device, and puts them
back in shards (`freeze`).

torch decides once, at the first forward pass, which FSDP module is the root of which others, and has no public way to
decide again. Without that a new block is a second root that never reshards after its forward pass, and the removed one
is never freed; nothing raises. `reset_roots` is the only function that changes private attributes of torch, and
`check_roots` the one that looks whether it worked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from iskd.models import surgery
from iskd.models.stack import SHARDED_TRUNK, Stack
from iskd.plan import Record
from iskd.system.faults import RunError

# minors of torch that `reset_roots` was tested with; tests/training/test_ranks.py shows whether another may be added
TESTED = ("2.13",)
_MINOR = ".".join(torch.__version__.split(".")[:2])
#: Why `reset_roots` is not used with the installed torch, or None.
UNTESTED = None if _MINOR in TESTED else f"they were tested with torch {', '.join(TESTED)}, this is {_MINOR}"


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Put every block of `model` and the rest of it into shards over `mesh`, in place; returns `model`."""
    for block in Stack(model).layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # the decoder without its head is no module with hooks of its own, and has to be entered through the root's
    setattr(model, SHARDED_TRUNK, partial(_trunk, Stack(model)))
    register_fsdp_forward_method(model, SHARDED_TRUNK)
    # every token is a pass, and all processes have to make as many, also where one ends its text before the others
    cast(Any, model).generate = partial(cast(Any, model).generate, synced_gpus=True)
    return model


def _trunk(stack: Stack, *given: Any) -> Tensor:
    return stack.trunk(*given)


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` was put into shards by `shard`."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Free whole weights, so that `parameters()` are the sharded ones that optimizer and checkpoints know."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_split(tensor: Tensor) -> bool:
    """Whether every rank holds only a shard of the tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor in shards, a collective; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, possibly empty; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor that every rank holds, placed and split as `target` is; no communication."""
    value = value.to(target.device)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def thaw(
    student: PreTrainedModel, teacher: PreTrainedModel, record: Record, layers: Iterable[int]
) -> dict[int, nn.Parameter]:
    """Put plain blocks with whole weights in the place of the sharded ones at `layers` (the teacher's numbering).

    Nothing happens to a student that is not in shards. A collective.

    Returns:
        By the id of each plain parameter, the sharded one whose optimizer state it carries on.
    """
    # the plain parameter is another object than the sharded one, and optimizer state goes by object: remember the pairs
    origin: dict[int, nn.Parameter] = {}
    chosen = sorted({record.layers.index(layer) for layer in layers})
    if not is_sharded(student) or not chosen:
        return origin
    reshard(student)  # a block that is whole just now shows whole parameters, which no optimizer knows
    stack = Stack(student)
    # hooks of FSDP cannot be taken off a block again, so plain ones are built from the record, without memory at first
    blocks, skeleton = list(stack.layers), Stack(surgery.rebuild(teacher, record, "meta")).layers
    for position in chosen:
        sharded = blocks[position]
        plain = skeleton[position].to_empty(device=_device(sharded)).train(sharded.training)
        blocks[position] = plain
        for name, parameter in sharded.named_parameters():
            copy = plain.get_parameter(name)
            copy.data = whole(parameter.detach())
            copy.requires_grad_(parameter.requires_grad)
            origin[id(copy)] = parameter
        for name, buffer in sharded.named_buffers():  # never in shards
            plain.get_buffer(name).copy_(buffer)
    stack.set_layers(blocks)
    return origin


def freeze(student: PreTrainedModel, origin: dict[int, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put the plain blocks of a student in shards, and hand the optimizer state of their inherited parameters on.

    Rank 0's weights count: `fully_shard` broadcasts nothing, and blocks that differ between ranks would become a
    consistent mixture of all of them, with no error. A collective.
    """
    if not is_sharded(student):
        return
    # every student has parameters in shards left: its root, which no edit touches
    mesh = next(p for p in student.parameters() if isinstance(p, DTensor)).device_mesh
    for block in Stack(student).layers:
        if is_sharded(block):
            continue
        # by name, since `fully_shard` makes new parameters under the old names; a replaced block inherits none
        inherited = {name: origin[id(p)] for name, p in block.named_parameters() if id(p) in origin}
        states = {name: optimizer.state.pop(p, None) for name, p in inherited.items()}
        from_first_rank(block)
        fully_shard(block, mesh=mesh)
        for name, parameter in block.named_parameters():
            if states.get(name) is not None:
                # same shape on the same mesh: the shards are the same ones
                optimizer.state[parameter] = states[name]
    reset_roots(student)  # the new blocks would be roots of their own


def reset_roots(model: nn.Module) -> None:
    """Let torch decide again, at the next forward pass, that `model` is the root of every FSDP module in it.

    Raises:
        RunError: the installed torch has other private attributes.
    """
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.reshard()
        state = _state(module)
        wanted = [name for name in ("_is_root", "_state_ctx", "_comm_ctx") if not hasattr(state, name)]
        if wanted:
            raise RunError(f"torch {torch.__version__} has no {wanted[0]}; use schedule.restart_at_edit=true")
        state._is_root, state._state_ctx, state._comm_ctx = None, type(state._state_ctx)(), type(state._comm_ctx)()
        for group in _groups(state):
            group._module_fqn = None


def check_roots(model: nn.Module) -> None:
    """Raise RunError when torch takes another module than `model` for a root: it would keep its weights whole.

    To be called after a forward pass; nothing for a model that is not in shards.
    """
    roots = [name for name, m in model.named_modules() if isinstance(m, FSDPModule) and _state(m)._is_root]
    if is_sharded(model) and roots != [""]:
        raise RunError(
            f"torch {torch.__version__} takes {roots or 'nothing'} for roots of the student in shards, not only the "
            "student itself: use schedule.restart_at_edit=true"
        )


def _state(module: FSDPModule) -> Any:
    return cast(Any, module)._get_fsdp_state()


def _groups(state: Any) -> Sequence[Any]:
    """Parameter groups of an FSDP state; older versions have one."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return cast(Sequence[Any], groups)


def _device(module: nn.Module) -> torch.device:
    return next(iter([*module.parameters(), *module.buffers(), torch.empty(0)])).device


@torch.no_grad()
def from_first_rank(module: nn.Module) -> None:
    """Give every rank the whole weights and buffers that rank 0 has. A collective; nothing on one process."""
    if not dist.is_initialized():
        return
    on_gpu = dist.get_backend() == "nccl"  # which moves nothing that lies on the CPU
    for tensor in [*module.parameters(), *module.buffers()]:
        sent = tensor.data.to(torch.cuda.current_device()) if on_gpu else tensor.data
        dist.broadcast(sent, src=0)
        tensor.data.copy_(sent)

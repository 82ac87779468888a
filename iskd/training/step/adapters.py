"""Healing with adapters of low rank (LoRA, arXiv 2106.09685), as LLM-Pruner (2305.11627) and 2403.17887 heal.

During a stage the maps of the blocks are frozen and a small A and B beside each of them train; at its end B A is added
to the map and the adapter is gone. Optimizer and gradients then cost memory for the adapters alone. It is not the
default: what it saves is memory, and RADLADS (2505.03005), for one, found it worse than training everything.

Not peft, which renames the base weights that checkpoints, records and parameter patterns go by and wraps the model
that edits take apart, while attaching and merging plain maps takes less code than undoing that at every stage's end.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iskd.models import Stack, sharding
from iskd.models.projections import weight_of
from iskd.plan import Record, Stage
from iskd.plan.stage import LoraSpec

# the submodule of a map that holds its adapter: base weights keep their names
NAME = "lora"
IN_SHARDS = (
    "schedule.train=lora adds adapters to whole weights and merges them, and trainer=fsdp splits the weights; use "
    "trainer=ddp (the frozen weights need no optimizer state there), or schedule.train=all with trainer=fsdp"
)


class Adapter(nn.Module):
    """What is added to the output of a map with weight [out, in]: (alpha / rank) B A x, zero at the start as B is.

    Float32, on the device of `weight`. A [rank, in] is drawn as loralib draws it, on the CPU, so that every rank and
    every device has the same one.
    """

    handle: RemovableHandle

    def __init__(self, weight: Tensor, spec: LoraSpec, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        rank = min(spec.rank, outputs, inputs)
        a = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5), generator=generator)
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        self.scale = spec.alpha / spec.rank

    def forward(self, x: Tensor) -> Tensor:
        """The addition [..., out] for inputs [..., in]."""
        return F.linear(F.linear(x, self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """The addition to the weight, [out, in]."""
        return self.b @ self.a * self.scale


def attach(model: PreTrainedModel, record: Record, spec: LoraSpec, skip: Iterable[nn.Parameter] = ()) -> None:
    """Give the maps of all blocks an adapter; no output changes. Embedding, head and tied weights get none.

    Args:
        model: a student with whole weights and no adapters.
        record: its record. Fresh values depend on `spec.seed`, the layer and the number of edits.
        spec: rank, strength, which maps.
        skip: parameters that train themselves, such as those of new blocks.

    Raises:
        ValueError: the model is in shards, or has no such map and nothing would train.
    """
    if sharding.is_sharded(model):
        raise ValueError(IN_SHARDS)
    assert not adapters(model), "the adapters of the last stage are still there"
    stack, skipped = Stack(model), {id(p) for p in skip}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer, block in zip(record.layers, stack.layers, strict=True):
        seed = (spec.seed * 10_007 + layer) * 10_007 + len(record.edits)
        generator = torch.Generator().manual_seed(seed % 2**63)
        for module in _maps(block, stack.family.attn, spec.targets):
            weight = module.get_parameter("weight")
            if id(weight) not in skipped and uses[id(weight)] == 1:
                adapter = Adapter(weight_of(module), spec, generator).train(module.training)
                adapter.handle = module.register_forward_hook(_added)
                module.add_module(NAME, adapter)
    if not skipped and not adapters(model):
        raise ValueError(
            f"schedule.lora.targets={spec.targets}: the blocks of this student have no such map, so nothing would "
            "train; choose schedule.lora.targets=all"
        )


def _maps(block: nn.Module, attn: str, targets: str) -> list[nn.Module]:
    """The linear maps of a block that `targets` means, in the module's order.

    A subclass is left out: it may compute something else, or its weight may be read without calling it.
    """
    maps = {path: module for path, module in block.named_modules() if type(module) in (nn.Linear, Conv1D)}
    chosen = {"attention": (True,), "mlp": (False,), "all": (True, False)}[targets]
    return [module for path, module in maps.items() if (attn in path.split(".")) in chosen]


def _added(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook of a map: its output plus its adapter's."""
    addition: Tensor = module.get_submodule(NAME)(args[0])
    return output + addition


def _attached(model: nn.Module) -> list[tuple[nn.Module, Adapter]]:
    """Every map with its adapter."""
    pairs = ((module, getattr(module, NAME, None)) for module in model.modules())
    return [(module, adapter) for module, adapter in pairs if isinstance(adapter, Adapter)]


def adapters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter; none for a plain model."""
    return [p for _, adapter in _attached(model) for p in adapter.parameters()]


@torch.no_grad()
def merge(model: nn.Module) -> bool:
    """Add every adapter to its weight, which stays the same parameter, and take it out; whether there was any."""
    found = _attached(model)
    for module, adapter in found:
        # a view of the weight, also where it is stored as [in, out]
        weight_of(module).add_(adapter.delta())
        adapter.handle.remove()
        delattr(module, NAME)
    return bool(found)


def merged(stage: Stage) -> Stage:
    """A finished stage as the optimizer sees it: without adapters there is a whole student again."""
    return dataclasses.replace(stage, train="all") if stage.train == "lora" else stage

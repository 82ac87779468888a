"""Blocks recomputed in the backward pass, or compiled: the same losses and gradients, after every edit.

Compiled is with the backends that need no C++ compiler; with torch's default one in a slow test, where there is one.
"""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from iskd.losses.ce import CrossEntropy
from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.models import Stack, surgery
from iskd.models.weights import model_tensors
from iskd.plan import Convert, Edit, Record, Remove, Replace, Stage
from iskd.plan.options import RunOptions
from iskd.refits import Text
from iskd.training.editing import carry_out
from iskd.training.step.block_runner import BlockRunner, _policy
from iskd.training.step.module import DistillModule
from iskd.training.step.optimizer import OptimSpec, make_optimizer
from tests.factories import mixer_specs, tiny, windows
from tests.runs import BOTTLENECK, MIXER, SLIM

LAYERS = 6
TERMS = {"kl": (KL(), 1.0), "ce": (CrossEntropy(), 0.5), "hidden": (HiddenMatch("normalized", "all"), 0.5)}
MIXED: tuple[Edit, ...] = (Replace(1, SLIM), Replace(3, BOTTLENECK), Remove(4), Convert(5, MIXER))
UPPER = r"\.[3-9]\."  # parameters of the blocks from position 3 on
# torch's compiler looks at the .grad of every tensor that comes in
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def distilled(
    edits: tuple[Edit, ...] = (), train: str = "all", *, family: str = "llama", layers: int = LAYERS, **options: Any
) -> tuple[DistillModule, torch.optim.Optimizer]:
    """A module after its first edits; the same numbers whatever the options."""
    teacher = tiny(family, layers=layers, dropout=0.2)
    module = DistillModule(copy.deepcopy(teacher), teacher, TERMS, OptimSpec(), Record(layers), **options)
    optimizer = make_optimizer(module.optim)
    edit(module, optimizer, edits, train)
    return module, optimizer


def edit(module: DistillModule, optimizer: torch.optim.Optimizer, edits: tuple[Edit, ...], train: str = "all") -> None:
    carry_out(module, optimizer, Stage("heal", edits, train=train), Text(), nullcontext)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2


def trained(module: DistillModule, optimizer: torch.optim.Optimizer, *, mixed: bool = False) -> dict[str, Tensor]:
    """Loss, its terms and all gradients of a step under dropout, and an update; `mixed`: under bf16 autocast."""
    torch.manual_seed(5)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        result = module.step(windows())
    result.loss.backward()
    grads = {name: p.grad.clone() for name, p in module.student.named_parameters() if p.grad is not None}
    optimizer.step()
    return {"loss": result.loss.detach(), **result.terms, **grads}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 5 and all(torch.equal(a[name], b[name]) for name in a)


def runs(model: Any) -> list[int]:
    """A list that grows by a block's position whenever the first linear map in it is run."""
    found: list[int] = []
    for position, block in enumerate(Stack(model).layers):
        first = next(inner for inner in block.modules() if isinstance(inner, nn.Linear))
        first.register_forward_pre_hook(lambda *_, position=position: found.append(position))
    return found


@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("train", ["all", UPPER])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_blocks_have_the_same_gradients_after_every_edit(family: str, train: str, how: Any) -> None:
    plain, again = (distilled(family=family, train=train, gradient_checkpointing=on) for on in (False, how))
    for number, edits in enumerate(((), MIXED, (Convert(2, MIXER, seed=9), Replace(0, BOTTLENECK, seed=2)))):
        for module, optimizer in (plain, again):
            edit(module, optimizer, edits, train)
        assert equal(trained(*plain, mixed=number == 1), trained(*again, mixed=number == 1))


@pytest.mark.parametrize("name", sorted(mixer_specs()))
def test_every_mixer_is_recomputed_selectively(name: str) -> None:
    edits = (Convert(1, mixer_specs()[name], seed=3),)
    plain, again = (distilled(edits, layers=3, gradient_checkpointing=on) for on in (False, "selective"))
    assert equal(trained(*plain, mixed=True), trained(*again, mixed=True))


def test_steps_in_one_autocast_context_are_recomputed_alike() -> None:
    """Casts of weights are kept until the context ends: the second step makes none, but for its own recomputation."""
    plain, again = (distilled(gradient_checkpointing=on) for on in (False, "selective"))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert equal(trained(*plain, mixed=True), trained(*again, mixed=True))


class Counting(TorchDispatchMode):
    """How often each operator really ran, and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.made[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        return result

    def alive(self) -> int:
        """Bytes that operators returned and somebody still holds."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


def test_a_selective_recomputation_repeats_no_product_and_keeps_less() -> None:
    """Products, attention and the rest, counted where they run; bytes that wait for the backward pass."""
    ran, waiting = {}, {}
    for how in (False, "selective", True):
        module = distilled(gradient_checkpointing=how, share_prefix=False)[0]
        module.student.eval()  # without dropout attention has a fused kernel
        with torch.autocast("cpu", torch.bfloat16), Counting() as counting:
            loss = module.step(windows(8, 48)).loss
        waiting[how] = counting.alive()
        with counting:
            loss.backward()
        ran[how] = counting.found
    for name in ("mm", "_scaled_dot_product_flash_attention_for_cpu"):
        assert ran[False][name] == ran["selective"][name] < ran[True][name]
    for name in ("silu", "rsqrt"):
        assert ran[False][name] < ran["selective"][name] == ran[True][name]
    assert waiting[True] < waiting["selective"] < 0.6 * waiting[False]


def test_what_draws_random_numbers_is_not_kept() -> None:
    """A kept result is not computed again, and leaves the generator where it was: fused attention on CUDA draws."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    kept, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    assert _policy(None, attention, 1, 2, 3, 0.0, True) is _policy(None, attention, 1, 2, 3) is kept
    assert _policy(None, attention, 1, 2, 3, 0.1, True) is again
    assert _policy(None, efficient, 1, 2, 3, None, True, 0.0) is kept
    assert _policy(None, efficient, 1, 2, 3, None, True, dropout_p=0.1) is again
    assert _policy(None, torch.ops.aten.silu.default, 1) is again


class Remembering(nn.Module):
    """Computes a product at its first call and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = (torch.arange(8.0).view(2, 4) @ torch.eye(4)).detach()
        return (self.second(self.first(x).sin()) * self.scale).cos()


def test_a_block_that_makes_a_product_only_once_is_not_for_selective_recomputation() -> None:
    """Why it is off by default; a complete one is right. For the day torch tells it."""
    found = {}
    for how in (False, True, "selective"):
        block, x = Remembering(), torch.ones(2, 4)
        run = block if how is False else BlockRunner(recompute=how)._recomputing(block)
        run(x).sum().backward()
        found[how] = torch.cat([p.grad for p in block.parameters() if p.grad is not None])
    torch.testing.assert_close(found[True], found[False])
    assert not torch.allclose(found["selective"], found[False])


def test_every_block_that_a_gradient_comes_to_is_run_twice_and_no_other() -> None:
    module, optimizer = distilled(train=UPPER, gradient_checkpointing=True, share_prefix=False)
    found, outside = runs(module.student), [0] * LAYERS
    for position, block in enumerate(Stack(module.student).layers):

        def count(*_: Any, position: int = position) -> None:
            outside[position] += 1

        block.register_forward_hook(count)
    trained(module, optimizer)
    assert sorted(found) == [0, 1, 2, 3, 3, 4, 4, 5, 5]
    assert outside == [1] * LAYERS  # hooks on blocks are not called again
    edit(module, optimizer, (Replace(5, BOTTLENECK),), UPPER)
    new = runs(module.student)
    trained(module, optimizer)
    assert new.count(5) == 2
    new.clear()
    with torch.no_grad():
        module.step(windows())
    assert sorted(new) == list(range(LAYERS))


@compiles
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_survive_edits_and_leave_names_alone(recompute: bool) -> None:
    torch._dynamo.reset()
    counters.clear()
    options: dict[str, Any] = {"layers": 3, "gradient_checkpointing": recompute}
    plain, fast = distilled(**options), distilled(**options, compile="eager")
    module, stack = fast[0], Stack(fast[0].student)
    for edits in ((), (Remove(0), Convert(1, MIXER), Replace(2, SLIM)))[recompute:]:
        for one, optimizer in (plain, fast):
            edit(one, optimizer, edits)
        assert equal(trained(*plain), trained(*fast))
        assert set(module.blocks._compiled) == {*stack.layers, *Stack(module.teacher).layers}
        assert not any("forward" in vars(inner) for inner in (*module.modules(), *module.teacher.modules()))
    assert counters["stats"]["unique_graphs"] > 0
    assert model_tensors(module.student).keys() == model_tensors(plain[0].student).keys()
    twin = surgery.rebuild(module.teacher, module.record)
    twin.load_state_dict(module.student.state_dict())
    assert torch.equal(twin.eval()(windows()).logits, module.student.eval()(windows()).logits)


@compiles
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_blocks_of_the_default_compiler_have_the_same_losses_and_gradients() -> None:
    torch._dynamo.reset()
    plain, fast = distilled(layers=3), distilled(layers=3, compile=True)
    for edits in ((), (Remove(0), Replace(2, SLIM))):
        for one, optimizer in (plain, fast):
            edit(one, optimizer, edits)
            one.student.eval()  # inductor draws other dropout masks
        expected, found = trained(*plain), trained(*fast)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def graphs(layers: int) -> int:
    """How many graphs a step of so many layers makes."""
    torch._dynamo.reset()
    counters.clear()
    trained(*distilled(layers=layers, compile="eager"))
    return int(counters["stats"]["unique_graphs"])


@compiles
def test_blocks_made_alike_are_compiled_once() -> None:
    assert 0 < graphs(2) == graphs(9)


def test_bad_options_are_refused() -> None:
    assert RunOptions(compile="aot_eager", gradient_checkpointing=True).compile == "aot_eager"
    assert RunOptions(gradient_checkpointing="selective").gradient_checkpointing == "selective"
    with pytest.raises(ValueError, match="do not go together"):
        BlockRunner(recompute="selective", compile=True)
    for size in (1, "5GB", "0.5 mb", "1TB"):
        split_torch_state_dict_into_shards({}, max_shard_size=RunOptions(max_shard_bytes=size).max_shard_bytes)
    sizes = [("max_shard_bytes", size) for size in ("5XB", "GB", "0GB", "-5GB", "nanGB", "infGB", "500", 0, True)]
    for key, value in (("compile", ""), ("compile", 3), ("gradient_checkpointing", "sometimes"), *sizes):
        with pytest.raises(ValueError, match=rf"run\.{key}={value!r}"):
            RunOptions(**{key: value})  # type: ignore[arg-type]

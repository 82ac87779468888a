"""`refit=output` beside a slow, obvious one: least squares on stacked rows, block after block, fold after fold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from iskd.blocks.ridge import row_weights
from iskd.models import Stack, surgery
from iskd.models.block_calls import BlockCalls
from iskd.models.capture import states_after
from iskd.models.projections import weight_of
from iskd.plan import Record, Remove
from iskd.refits import RefitTask
from iskd.refits.output import Output
from tests.factories import louder, tiny, windows

CUT = 1
TEXT = list(windows(24, 16, seed=5).split(4))


def task_of(family: str, folds: int) -> RefitTask:
    teacher: Any = louder(tiny(family))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [Remove(CUT)])
    # judged by what it is fitted to, or by much the same text, so that every fit is better than what was there
    text, fold_of = list(TEXT), [0] * len(TEXT)
    for fold in range(1, folds):
        for batch in TEXT:
            text.append(batch.clone())
            text[-1][:, 15] = fold
            fold_of.append(fold)
    return RefitTask(made, teacher, record, [Remove(CUT)], text, TEXT, fold_of)


class Slow:
    """The student whose projections are solved one after the other, each batch with the weights of its fold."""

    def __init__(self, task: RefitTask, ridge: float, share: float) -> None:
        self.task, self.ridge, self.share = task, ridge, share
        self.model = copy.deepcopy(task.student)
        self.stack, self.teacher = Stack(self.model), Stack(task.teacher)
        self.calls = [BlockCalls(self.stack, batch) for batch in task.fit]
        self.streams = [calls.embedded for calls in self.calls]

    def run(self, position: int, index: int, path: str, weights: dict[tuple[str, int], Any]) -> tuple[Tensor, ...]:
        """Inputs of a projection, what it adds, and the block's output, with the weights of the batch's fold."""
        block, fold = self.stack.layers[position], self.task.fold_of[index]
        for (name, number), values in weights.items():
            if number == fold:
                put(block.get_submodule(name), values)
        seen: list[Tensor] = []
        module = block.get_submodule(path)
        handle = module.register_forward_hook(lambda _m, args, out: seen.extend((args[0], out)))
        output = self.calls[index].run(position, block, self.streams[index])
        handle.remove()
        x, added = (tensor.view(*output.shape[:-1], -1) for tensor in seen)
        return x, self.stack.residual_scale * added, output

    def goal(self, layer: int, index: int, *, between: bool) -> Tensor:
        after = self.task.record.state_after(layer)
        if not between:
            return states_after(self.teacher, range(4), {after}, self.task.fit[index])[after]
        heard: list[Tensor] = []
        block = self.teacher.layers[layer]
        handles = [
            block.register_forward_pre_hook(lambda _m, args: heard.append(args[0])),
            block.get_submodule(self.teacher.family.attn).register_forward_hook(
                lambda _m, _a, out: heard.append(self.teacher.residual_scale * out[0])
            ),
        ]
        states_after(self.teacher, range(4), {layer}, self.task.fit[index])
        for handle in handles:
            handle.remove()
        return heard[0] + heard[1]

    def solve(self, paths: Sequence[str]) -> None:
        folds = sorted(set(self.task.fold_of))
        for position, layer in enumerate(self.task.record.layers):
            block = self.stack.layers[position]
            weights: dict[tuple[str, int], Any] = {}
            final: dict[str, Any] = {}
            for path in paths:
                attention = path == self.stack.family.out
                share, apart = (self.share if attention else 1.0), attention and self.stack.sequential
                old, rows = taken(block.get_submodule(path), self.stack.residual_scale), []
                for index in range(len(self.task.fit)):
                    x, added, output = self.run(position, index, path, weights)
                    target = self.goal(layer, index, between=apart)
                    others = self.streams[index] if apart else output - added
                    w = row_weights(target)
                    if old[1] is not None:
                        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
                    rows.append(((x * w).flatten(0, 1).double(), ((target - others) * w).flatten(0, 1).double()))
                for fold in folds:
                    every = zip(rows, self.task.fold_of, strict=True)
                    used = [row for row, of in every if len(folds) == 1 or of != fold]
                    weights[path, fold] = self.fitted(used, old, share)
                final[path] = self.fitted(rows, old, share)
            self.streams = [self.run(position, index, paths[-1], weights)[2] for index in range(len(self.task.fit))]
            for path, values in final.items():
                put(block.get_submodule(path), values)

    def fitted(self, rows: list[tuple[Tensor, Tensor]], old: tuple[Tensor, Any], share: float) -> tuple[Tensor, Any]:
        """Least squares with the pull towards the old weights as rows of its own; `share` of the way there."""
        x, y = (torch.cat(each) for each in zip(*rows, strict=True))
        before = old[0].T if old[1] is None else torch.cat([old[0].T, old[1][None]])
        pull = (self.ridge * x.square().sum(0).mean()).sqrt()
        a = torch.cat([x, pull * torch.eye(x.shape[1], dtype=torch.float64)])
        found = torch.linalg.lstsq(a, torch.cat([y, pull * before])).solution
        found = (before + share * (found - before)) / self.stack.residual_scale
        return (found.T, None) if old[1] is None else (found[:-1].T, found[-1])


def taken(module: Any, scale: float) -> tuple[Tensor, Tensor | None]:
    bias = getattr(module, "bias", None)
    return scale * weight_of(module).double().clone(), None if bias is None else scale * bias.double().clone()


def put(module: Any, values: tuple[Tensor, Tensor | None]) -> None:
    weight_of(module).copy_(values[0])
    if values[1] is not None:
        module.bias.copy_(values[1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "share", "folds"),
    [("llama", 1.0, 1), ("llama", 0.5, 1), ("llama", 0.5, 3), ("phi", 0.5, 1), ("phi", 0.5, 2), ("granite", 0.5, 1)],
)
def test_attention_and_mlp_are_the_slow_least_squares(family: str, share: float, folds: int) -> None:
    task = task_of(family, folds)
    slow = Slow(task, 0.3, share)
    slow.solve((slow.stack.family.out, slow.stack.family.down))
    before = copy.deepcopy(task.student)
    told = Output(ridge=0.3, attention_share=share, folds=folds).refit(task)
    assert not [line for line in told if "left as they were" in line], told
    moved = 0
    pairs = zip(task.student.named_parameters(), slow.model.parameters(), before.parameters(), strict=True)
    for (name, ours), theirs, old in pairs:
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm().clamp_min(1e-3), name
        moved += not torch.equal(ours, old)
    assert moved >= 6, "both projections of three blocks"


@torch.no_grad()
@pytest.mark.parametrize("projections", [("attention", "mlp"), ("attention",), ("mlp",)])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox"])
def test_attention_and_mlp_run_once(family: str, projections: tuple[str, ...]) -> None:
    """Also where they read the same stream, and whichever of them is solved."""
    task = task_of(family, 1)
    stack, ran = Stack(task.student), {"attention": 0, "mlp": 0}
    block = stack.layers[1]
    for part, path in (("attention", stack.family.qkv[0]), ("mlp", stack.family.ups[0])):
        block.get_submodule(path).register_forward_pre_hook(lambda *_, p=part: ran.update({p: ran[p] + 1}))
    Output(projections=projections).refit(task)
    batches = len(task.fit) + len(task.held)
    assert ran == {"attention": batches, "mlp": batches}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("blocks", ["gaps", "above", "all"])
def test_the_chosen_blocks_are_those_that_change(blocks: str, trained: bool) -> None:
    """Of layers 0 1 3 5 and 7, where 2 and 4 went and 6 went before: below this stage's gaps, from there up, or all.

    Layer 0 is the teacher's still, or was trained before.
    """
    teacher: Any = louder(tiny("llama", num_hidden_layers=8))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(8), [Remove(6)])
    edits = [Remove(2), Remove(4)]
    record = surgery.apply(made, record, edits)
    if trained:
        Stack(made).layers[0].get_submodule("mlp.down_proj").get_parameter("weight").data.mul_(1.1)
    before = [{n: p.clone() for n, p in block.named_parameters()} for block in Stack(made).layers]
    with torch.no_grad():
        Output(blocks=blocks, ridge=0.3).refit(RefitTask(made, teacher, record, edits, TEXT, TEXT))
    changed = [
        layer
        for layer, block, old in zip(record.layers, Stack(made).layers, before, strict=True)
        if any(not torch.equal(p, old[n]) for n, p in block.named_parameters())
    ]
    assert changed == {"gaps": [1, 3], "above": [1, 3, 5, 7], "all": [0] * trained + [1, 3, 5, 7]}[blocks]

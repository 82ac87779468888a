"""Values of mixers in closed form: as dense least squares have it, no worse on held-out text, refused where unfit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from iskd.blocks.ridge import row_weights
from iskd.models import Stack, surgery
from iskd.plan import Convert, Edit, Record, Spec
from iskd.refits import RefitTask, refit_survivors
from iskd.refits.head_sums import conjugate_gradients
from iskd.refits.values import Values, why_not
from tests.factories import digest, hooks, louder, mixer_specs, text_of, tiny, windows

WINDOW = Spec("iskd.mixers.sliding.Sliding", {"window": 3, "sinks": 1, "feature_map": "none"})
LINEAR = Spec("iskd.mixers.linear_attention.LinearAttention", {})


def made(
    spec: Spec, family: str = "llama", layers: tuple[int, ...] = (0,), **config: Any
) -> tuple[Any, Any, RefitTask]:
    """A student with a mixer in some layers, and the text to refit it on, of which the held-out part is the same."""
    teacher = louder(tiny(family, hidden=24, heads=6, kv_heads=3, mlp=48))
    edits: list[Edit] = [Convert(layer, spec, seed=3) for layer in layers]
    student = copy.deepcopy(teacher)
    record = surgery.apply(student, Record(4), edits)
    text = list(windows(12, 16, seed=5).split(4))
    return student, teacher, RefitTask(student, teacher, record, edits, text, text)


def missing(student: Any, teacher: Any, task: RefitTask) -> tuple[Tensor, Tensor]:
    """What the first block's stream lacks after its mixer, of all windows [N, T, D], and the weights of the rows."""
    ids, after = torch.cat(list(task.fit)), list[Tensor]()
    for model in (teacher, student):
        attention = Stack(model).layers[0].get_submodule(Stack(model).family.attn)
        handle = attention.register_forward_hook(lambda _m, _a, output: after.append(output[0]))
        model(ids)
        handle.remove()
    stream = Stack(teacher).base.get_input_embeddings()(ids)
    return after[0] - after[1], row_weights(stream + after[0])


@pytest.mark.parametrize(
    ("spec", "family"), [(WINDOW, "llama"), (LINEAR, "qwen2"), (Spec(LINEAR.target, {"heads": 3}), "llama")]
)
@torch.no_grad()
def test_each_head_is_the_dense_ridge_solution(spec: Spec, family: str) -> None:
    """Two query heads read each key-value head, with a bias (qwen2) and without; with fewer heads one reads each."""
    student, teacher, task = made(spec, family)
    mixer: Any = Stack(student).layers[0].get_submodule("self_attn.mixer")
    expected = copy.deepcopy(student)
    ours: Any = Stack(expected).layers[0].get_submodule("self_attn.mixer")
    ids, ridge = torch.cat(list(task.fit)), 0.1
    heard: list[Any] = []
    handle = ours.register_forward_pre_hook(lambda _m, args, kwargs: heard.append((args[0], kwargs)), with_kwargs=True)
    expected(ids)
    handle.remove()
    x, positions = heard[0][0], heard[0][1]["positions"]
    v, width = ours.projections.get_submodule("v_proj"), ours.head_dim
    for head in range(ours.kv_heads):
        lacking, weights = missing(expected, teacher, task)
        rows = slice(head * width, (head + 1) * width)

        def out(change: Tensor, rows: slice = rows, weights: Tensor = weights) -> Tensor:
            """The mixer's output, weighted, with a change of one head's weights (and bias)."""
            new = {"projections.v_proj.weight": v.weight.clone()}
            new["projections.v_proj.weight"][rows] += change[:, : v.in_features]
            if v.bias is not None:
                new["projections.v_proj.bias"] = v.bias.clone()
                new["projections.v_proj.bias"][rows] += change[:, -1]
            return (functional_call(ours, new, (x,), {"positions": positions}) * weights).flatten()

        start = torch.zeros(width, v.in_features + (v.bias is not None))
        units = torch.eye(start.numel()).view(-1, *start.shape)
        jacobian = torch.stack([out(unit) - out(start) for unit in units], 1).double()
        gram = jacobian.T @ jacobian
        right = jacobian.T @ (lacking * weights).flatten().double()
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
        change = torch.linalg.solve(gram, right).view(start.shape)
        v.weight[rows] += change[:, : v.in_features].float()
        if v.bias is not None:
            v.bias[rows] += change[:, -1].float()
    told = Values(ridge=ridge).refit(task)
    assert "left as they were" not in told[0]
    found = mixer.projections.get_submodule("v_proj")
    torch.testing.assert_close(found.weight, v.weight, atol=2e-4, rtol=2e-3)
    if v.bias is not None:
        torch.testing.assert_close(found.bias, v.bias, atol=2e-4, rtol=2e-3)
    assert hooks(student) == 0


def test_conjugate_gradients_solve_what_is_no_product() -> None:
    torch.manual_seed(0)
    a, b = (x @ x.T for x in torch.randn(2, 12, 12, dtype=torch.float64))
    right = torch.randn(12, dtype=torch.float64)
    found = conjugate_gradients(lambda x: a @ x + b @ x, right, lambda r: torch.linalg.solve(a, r))
    torch.testing.assert_close((a + b) @ found, right)


def test_a_window_comes_nearer_to_its_teacher(teacher: PreTrainedModel, said: list[Tensor]) -> None:
    """Held-out KL falls on text that was not fitted to, with the rest of the model as it was."""
    edits = [Convert(layer, Spec(WINDOW.target, {**WINDOW.kwargs, "window": 8}), seed=3) for layer in range(4)]
    student = copy.deepcopy(teacher)
    record = surgery.apply(student, Record(len(Stack(teacher).layers)), edits)
    others = {name: p.clone() for name, p in student.named_parameters() if "v_proj" not in name}
    told = refit_survivors([Values()], student, teacher, record, edits, text_of(said, Values()))
    before, after = (float(word.split()[0]) for word in told[-1].partition("KL ")[2].split("->"))
    assert after < before
    assert "values of 4 mixers re-solved" in told[0]
    assert all(torch.equal(p, others[name]) for name, p in student.named_parameters() if name in others)


@torch.no_grad()
def test_in_parallel_with_an_mlp_the_whole_block_counts() -> None:
    """In families whose MLP reads the same stream, the mixer is fitted to what the block lacks beside it."""
    student, teacher, task = made(WINDOW, "gpt_neox", layers=(0, 1, 2, 3))

    def distance() -> float:
        found = [Stack(student).last_hidden(ids) - Stack(teacher).last_hidden(ids) for ids in task.fit]
        return float(torch.cat(found).norm(dim=-1).mean())

    before = distance()
    Values(ridge=0.01).refit(task)
    assert distance() < before


def test_unfit_mixers_are_refused_by_name() -> None:
    """With the reason, before anything changes; beside fit ones they are left as they are."""
    reasons = {
        "gla": "GLA has a norm",
        "mamba": "Mamba has no mixing matrix",
        "mamba2": "Mamba2 has a short convolution",
    }
    for name, why in reasons.items():
        student, _, task = made(mixer_specs()[name])
        unchanged = digest(student)
        with pytest.raises(ValueError, match=f"refit=values: {why}"):
            Values().refit(task)
        assert digest(student) == unchanged
    gated = Spec("iskd.mixers.mamba2.DiscreteMamba2", {"conv": 0})
    student, _, _ = made(gated)
    assert "a gate" in why_not(Stack(student).layers[0].get_submodule("self_attn.mixer"))
    student, teacher, task = made(WINDOW)
    both = [*task.edits, Convert(2, gated, seed=3)]
    student = copy.deepcopy(teacher)
    record = surgery.apply(student, Record(4), both)
    with torch.no_grad():
        told = Values().refit(RefitTask(student, teacher, record, both, task.fit, task.held))
    assert "values of 1 mixers re-solved" in told[0]
    assert told[1].startswith("layers 2 left as they are: DiscreteMamba2 has a gate")
    with pytest.raises(ValueError, match=r"refit\.values\.ridge"):
        Values(ridge=())

"""Laws of merging: a block that adds nothing changes nothing, sizes stay, and removal is never better."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from iskd.blocks import Merged, merge, warm_start
from iskd.blocks.base import FitData, fit_error
from iskd.blocks.merge import merged
from iskd.evaluation import measure_quality
from iskd.export.student import write
from iskd.models import Stack, surgery
from iskd.models.capture import Trace, states_after
from iskd.plan import Edit, Record, Remove, Replace, Spec
from iskd.plan.edits import Merge
from tests.factories import BEHIND, FAMILIES, digest, hooks, silence, tiny, windows

LOWER, UPPER = 1, 2
IDENTITY = Spec("iskd.blocks.identity.Identity")


@torch.no_grad()
def teacher_of(family: str, **sizes: Any) -> PreTrainedModel:
    """A model whose norms and biases are not all the same, those of queries and keys apart."""
    model, generator = tiny(family, **sizes), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def data_of(model: PreTrainedModel, batches: Sequence[Tensor]) -> FitData:
    """What enters the lower block, and the states after the upper one."""
    traces = [Trace(Stack(model), batch, LOWER) for batch in batches]
    after = [states_after(Stack(model), range(4), {UPPER}, batch)[UPPER] for batch in batches]
    return FitData(
        [trace.input for trace in traces], after, lambda block, h, i: traces[i].run(LOWER, block, h), Stack(model)
    )


@pytest.mark.parametrize("silent", [UPPER, LOWER])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in BEHIND])
def test_a_pair_of_which_one_adds_nothing_is_the_other(family: str, silent: int) -> None:
    # of two layers of SmolLM3 of which one has no positions, the merged one has those of the lower
    model = teacher_of(family, **({"no_rope_layer_interval": 9} if family == "smollm3" else {}))
    silence(model, silent)
    lower, upper = (Stack(model).layers[position] for position in (LOWER, UPPER))
    before = digest(model)
    with torch.no_grad():
        data = data_of(model, [windows(4, 32, seed=seed) for seed in range(2)])
        new = merged(lower, upper, data, 0.1)
        ours, theirs = data.run(new, data.inputs[0], 0), data.targets[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (digest(model), hooks(model)) == (before, 0)
    assert type(new) is type(lower)
    assert {n: p.shape for n, p in new.named_parameters()} == {n: p.shape for n, p in lower.named_parameters()}


@pytest.mark.parametrize("family", BEHIND)
def test_blocks_with_norms_behind_them_are_not_merged(family: str) -> None:
    model = teacher_of(family)
    lower, upper = (Stack(model).layers[position] for position in (LOWER, UPPER))
    with pytest.raises(ValueError, match=r"passes a norm before it is added to the stream.*use edit=remove"):
        merged(lower, upper, data_of(model, [windows()]), 0.1)


def start(teacher: PreTrainedModel, *edits: Edit) -> tuple[PreTrainedModel, Record, dict[int, nn.Module]]:
    student, record = copy.deepcopy(teacher), Record(len(Stack(teacher).layers))
    old = dict(zip(record.layers, Stack(student).layers, strict=True))
    return student, surgery.apply(student, record, edits), old


def distance(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> float:
    return measure_quality(student, teacher, [{"input_ids": batch} for batch in batches])["kl"]


def carried_out(
    teacher: PreTrainedModel, *edits: Edit, count: int = 8
) -> tuple[PreTrainedModel, Record, list[Merged], list[Tensor]]:
    """The student after `edits`, what its merges were worth, and the windows that they were judged by."""
    student, record, old = start(teacher, *edits)
    held: list[Tensor] = []

    def judge(batches: Sequence[Tensor]) -> float:
        held[:] = batches
        return distance(student, teacher, batches)

    every = windows(count, 32)
    fit, held_out = (part.split(2) if len(part) else () for part in (every[2:], every[:2]))
    done = warm_start(student, teacher, old, record, edits, fit, held_out, judge)
    assert all(isinstance(one, Merged) for one in done)
    return student, record, [one for one in done if isinstance(one, Merged)], held


@pytest.mark.parametrize(
    "edits",
    [(Merge(UPPER),), (Merge(2), Merge(1)), (Remove(2), Merge(3)), (Merge(2), Remove(1)), (Merge(1), Merge(3))],
    ids=["one", "two into one", "across a gap", "its neighbour removed after it", "two pairs"],
)
def test_a_merge_is_never_farther_from_the_teacher_than_a_removal(edits: tuple[Edit, ...]) -> None:
    teacher = teacher_of("llama")
    student, record, done, held = carried_out(teacher, *edits)
    merges = sorted(edit.layer for edit in edits if isinstance(edit, Merge))
    assert [(one.layer, one.into) for one in done] == [(layer, record.below(layer)) for layer in merges]
    plain = start(teacher, *[Remove(edit.layer) for edit in edits])[0]
    assert sum(batch.shape[0] for batch in held) == 2, "the text held out, and no other"
    best = min(min(one.removed, one.merged) for one in done[-1:])
    assert distance(student, teacher, held) == pytest.approx(best, rel=1e-5)
    assert distance(student, teacher, held) <= distance(plain, teacher, held) + 1e-7
    assert record == Record(4).extended(edits)
    assert surgery.rebuild(teacher, record).load_state_dict(student.state_dict())


def test_what_is_better_stays_and_loads_anywhere(tmp_path: Path) -> None:
    teacher = teacher_of("llama")
    nothing_lost = copy.deepcopy(teacher)
    silence(nothing_lost, UPPER)
    student, _, done, _ = carried_out(nothing_lost, Merge(UPPER))
    assert digest(student) == digest(start(nothing_lost, Remove(UPPER))[0]), "removal was exact"
    assert str(done[0]).endswith("removed, as that is no farther")

    silence(teacher, LOWER)
    student, record, done, _ = carried_out(teacher, Merge(UPPER))
    assert done[0].merged < 1e-6 < done[0].removed
    assert str(done[0]).startswith(f"layer {UPPER} into {LOWER}: held-out KL ")
    write(tmp_path, student, record, teacher.config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(teacher)
    with torch.no_grad():
        torch.testing.assert_close(loaded(windows()).logits, student(windows()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("edits", "count", "message"),
    [
        ((Merge(2),), 1, "two calibration windows at least, .* and has 1: raise run.fit_tokens, or use edit=remove"),
        ((Merge(2), Replace(1, IDENTITY)), 8, "merge 2 into 1: the block at layer 1 is another kind of block"),
        ((Merge(1), Remove(0)), 8, "merge 1: all layers below it were removed; remove it too"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(edits: tuple[Edit, ...], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        carried_out(teacher_of("llama"), *edits, count=count)


def test_norms_behind_the_sums_are_refused() -> None:
    teacher = tiny("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match=r"cannot be merged: a norm stands behind the sums .* use edit=remove"):
        carried_out(teacher, Merge(UPPER))


SLIDING = {"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, "only the lower one of the two has rotary positions"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "only the upper one of the two has rotary positions"),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, **SLIDING}, "upper one to a window of 8 tokens"),
    ],
)
def test_a_pair_with_other_positions_or_windows_is_removed_by_name(family: str, config: Any, why: str) -> None:
    """One block cannot see as both did: no merge is tried, and the run goes on with the removal."""
    teacher = teacher_of(family, **config)
    lower, upper = (Stack(teacher).layers[position] for position in (LOWER, UPPER))
    with pytest.raises(ValueError, match=rf"cannot be merged, as .*{why}.*use edit=remove"):
        merged(lower, upper, data_of(teacher, [windows()]), 0.1)
    student, _, done, _ = carried_out(teacher, Merge(UPPER))
    assert digest(student) == digest(start(teacher, Remove(UPPER))[0])
    assert not done[0].better
    assert f"layer {UPPER} into {LOWER}: not merged but removed, as" in str(done[0])
    assert why in str(done[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "phi3"])
def test_the_attention_is_resolved_where_that_is_better(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the merged block does not rise for it, and for pairs whose heads matter it falls."""
    model = teacher_of(family)
    for position in (LOWER, UPPER):
        for path in (Stack(model).family.out, *Stack(model).family.qkv):
            Stack(model).layers[position].get_submodule(path).get_parameter("weight").mul_(6)
    lower, upper = (Stack(model).layers[position] for position in (LOWER, UPPER))
    data = data_of(model, [windows(8, 32, seed=seed) for seed in range(2)])
    new = merged(lower, upper, data, 0.1)
    monkeypatch.setattr(merge, "_with_solved_attention", lambda _wide, narrow, system, *_: (narrow, system))
    plain = merged(lower, upper, data, 0.1)
    assert fit_error(new, data) < fit_error(plain, data)
    assert {n: p.shape for n, p in new.named_parameters()} == {n: p.shape for n, p in lower.named_parameters()}

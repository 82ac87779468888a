"""`refit=local` in two shares: what each trains, and that its record compares the block's output with itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from iskd.mixers.sliding import Sliding
from iskd.models import Stack, surgery
from iskd.plan import Convert, Record, Remove, Spec
from iskd.refits import RefitTask
from iskd.refits.local import Local, _shares
from iskd.refits.walk import walk
from tests.factories import digest, louder, tiny, windows

NORMS = {
    "llama": {"input_layernorm"},
    "gemma2": {"input_layernorm", "post_attention_layernorm"},
    "olmo2": {"post_attention_layernorm"},
    "gpt2": {"ln_1"},
    "opt": {"self_attn_layer_norm"},
}
TEXT = list(windows(12, 16, seed=5).split(4))


def task(family: str) -> RefitTask:
    teacher: Any = louder(tiny(family))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [Remove(1)])
    return RefitTask(made, teacher, record, [Remove(1)], TEXT[:2], TEXT[2:])


@torch.no_grad()
@pytest.mark.parametrize("family", NORMS)
def test_the_first_share_is_attention_and_its_norms(family: str) -> None:
    """What the state between attention and MLP depends on, so that the second share leaves that state alone."""
    given = task(family)
    site = next(iter(walk(given, attention=True)))
    names = {id(parameter): name for name, parameter in site.block.named_parameters()}
    (first, attention), (second, whole) = _shares(site, True)
    assert (attention, whole) == (site.submodule(site.stack.family.attn), None)
    found = {names[id(parameter)] for parameter in first}
    path = site.stack.family.attn + "."
    assert {name.rpartition(".")[0] for name in found if not name.startswith(path)} == NORMS[family]
    assert {name for name in names.values() if name.startswith(path)} <= found
    assert found.isdisjoint(names[id(parameter)] for parameter in second)
    assert len(first) + len(second) == len(names)
    assert not any(parameter.grad is not None for parameter in site.block.parameters())


@torch.no_grad()
def test_a_window_drops_out_while_local_work_trains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In passes with gradients alone, alike whatever was drawn before; afterwards the mixer is as it was."""
    reached: list[tuple[bool, int]] = []
    original = Sliding._reach

    def reach(self: Sliding, context: Any) -> int:
        reached.append((torch.is_grad_enabled(), original(self, context)))
        return reached[-1][1]

    monkeypatch.setattr(Sliding, "_reach", reach)
    spec = Spec("iskd.mixers.sliding.Sliding", {"window": 4, "sinks": 1, "window_dropout": 0.5})
    edits = [Convert(layer, spec, seed=layer) for layer in (0, 2)]
    found = []
    for seed in (0, 1):
        teacher: Any = louder(tiny("llama"))
        student = copy.deepcopy(teacher)
        record = surgery.apply(student, Record(4), edits)
        student.eval()
        torch.manual_seed(seed)
        drawn = torch.get_rng_state()
        work = Local(tokens=128, held_tokens=64, lr=1e-3, epochs=4)
        work.refit(RefitTask(student, teacher, record, edits, TEXT[:2], TEXT[2:]))
        assert torch.equal(drawn, torch.get_rng_state())
        assert not any(module.training for module in student.modules())
        found.append((list(reached), digest(student)))
        reached.clear()
    assert {seen for training, seen in found[0][0] if training} == {1, 4}
    assert {seen for training, seen in found[0][0] if not training} == {4}
    assert found[0] == found[1]


@torch.no_grad()
def test_the_record_compares_the_output_with_itself() -> None:
    def before(sublayers: bool) -> Sequence[str]:
        told = Local(tokens=128, held_tokens=64, lr=1e-4, epochs=1, sublayers=sublayers).refit(task("llama"))
        return told[0].split("held-out text ")[1].split(" -> ")

    # of the first block it is the same number; those above it read what it was trained to, so they differ a little
    (whole, _), (apart, after) = before(False), before(True)
    assert float(apart) == pytest.approx(float(whole), rel=0.02)
    assert float(after) <= float(apart)
    assert Stack(task("llama").student).sequential

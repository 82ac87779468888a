"""Laws of capture: every layer's state, whatever stands there, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from iskd.models import surgery
from iskd.models.capture import Trace, capture, read, states_after
from iskd.models.head import cap_logits
from iskd.models.stack import Stack
from iskd.plan import Record, Remove, Replace, Spec
from tests.factories import FAMILIES, hooks, tiny, windows

BOTTLENECK = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 3, "zero_up": False})
EDITS = (
    Replace(0, BOTTLENECK),
    Remove(1),
    Replace(3, Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})),
    Replace(4, Spec("iskd.blocks.identity.Identity")),
)
RECORD = Record(6).extended(EDITS)


def student_of(family: str) -> PreTrainedModel:
    model = tiny(family, layers=6)
    surgery.apply(model, Record(6), EDITS)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_there_is_a_state_after_every_layer(family: str) -> None:
    student, ids = student_of(family), windows()
    stack = Stack(student)
    with capture(stack, RECORD.layers, RECORD.layers) as states:
        logits = student(ids).logits
    assert tuple(states) == RECORD.layers == (0, 2, 3, 4, 5)
    assert {state.shape for state in states.values()} == {(2, 16, 48)}
    assert hooks(student) == 0
    for layer in RECORD.layers:
        # the state after a layer is the last one of the model that ends there
        short = copy.deepcopy(student)
        kept = [i for i, other in enumerate(RECORD.layers) if other <= layer]
        Stack(short).set_layers([Stack(short).layers[i] for i in kept], kept)
        assert torch.equal(Stack(short).last_hidden(ids), stack.final_norm(states[layer])), layer
    found = torch.nn.functional.linear(stack.final_norm(states[5]), *stack.head)
    assert torch.equal(cap_logits(found, scale=1.0, softcap=stack.softcap), logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_trace_repeats_the_stream_block_by_block(family: str) -> None:
    student, ids = student_of(family), windows()
    stack = Stack(student)
    with capture(stack, RECORD.layers, RECORD.layers) as states:
        student(ids)
    trace = Trace(stack, ids, 0)
    stream = trace.input
    for position, layer in enumerate(RECORD.layers):
        assert torch.equal(Trace(stack, ids, position).input, stream)
        stream = trace.run(position, stack.layers[position], stream)
        assert torch.equal(stream, states[layer]), layer
    assert hooks(student) == 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_above_what_is_wanted_are_not_run(family: str) -> None:
    student, ids = student_of(family), windows()
    stack = Stack(student)
    with capture(stack, RECORD.layers, {0, 3}) as states:
        student(ids)
    runs: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: runs.append(layer))
        for layer, block in zip(RECORD.layers, stack.layers, strict=True)
    ]
    found = states_after(stack, RECORD.layers, {3, 0}, ids)
    assert runs == [0, 2, 3]
    assert set(found) == {0, 3}
    assert all(torch.equal(found[layer], states[layer]) for layer in found)
    runs.clear()
    trace = Trace(stack, ids, 1, 2)
    assert runs == [0, 2]
    assert torch.equal(trace.input, states[0])
    assert torch.equal(trace.run(2, stack.layers[2], trace.run(1, stack.layers[1], trace.input)), states[3])
    for handle in handles:
        handle.remove()
    assert hooks(student) == 0


def test_only_what_is_wanted_is_kept_and_gradients_flow() -> None:
    model = tiny("llama")
    with capture(Stack(model), range(4), {2}) as states:
        model(windows())
    assert list(states) == [2]
    states[2].sum().backward()
    grads = [next(block.parameters()).grad is not None for block in Stack(model).layers]
    assert grads == [True, True, True, False]


def test_each_forward_pass_fills_the_states_anew() -> None:
    model = tiny("llama")
    with torch.no_grad(), capture(Stack(model), range(4), {1}) as states:
        model(windows(seed=1))
        first = states[1]
        model(windows(seed=2))
        assert not torch.equal(first, states[1])


def test_hooks_are_gone_after_an_exception() -> None:
    model = tiny("llama")
    with pytest.raises(IndexError), capture(Stack(model), range(4), {0, 3}):
        model(torch.tensor([[5000]]))
    with pytest.raises(IndexError):
        Trace(Stack(model), torch.tensor([[5000]]), 0)
    with pytest.raises(IndexError):
        states_after(Stack(model), range(4), {1}, torch.tensor([[5000]]))
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("layers", "wanted", "message"),
    [
        (RECORD.layers, {0, 1}, r"cannot capture the state after layer 1: the stack holds \[0, 2, 3, 4, 5\]"),
        (RECORD.layers, {6}, "cannot capture the state after layer 6"),
        (range(4), {0}, "the stack holds 5 blocks, not"),
        (range(6), {0}, "the stack holds 5 blocks, not"),
    ],
)
def test_states_that_do_not_exist_are_refused(layers: range, wanted: set[int], message: str) -> None:
    student = student_of("llama")
    with pytest.raises(ValueError, match=message), capture(Stack(student), layers, wanted):
        pass
    assert hooks(student) == 0


@torch.no_grad()
def test_a_pass_is_as_short_as_what_is_read() -> None:
    student, ids = student_of("llama"), windows()
    stack = Stack(student)
    last, states = read(stack, RECORD.layers, {0, 3}, ids, last=True)
    assert last is not None
    assert torch.equal(last, stack.last_hidden(ids))
    assert set(states) == {0, 3}
    nothing, short = read(stack, RECORD.layers, {0, 3}, ids, last=False)
    assert nothing is None
    assert all(torch.equal(short[layer], states[layer]) for layer in states)
    stack.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("nothing is read, and a block runs"))
    assert read(stack, RECORD.layers, set(), ids, last=False) == (None, {})

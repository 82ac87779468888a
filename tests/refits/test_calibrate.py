"""Gates and sizes of mixers from the teacher's attention: the statistics by hand, the gates that follow, the share."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from iskd.models import Stack, surgery
from iskd.models.capture import attention_weights
from iskd.plan import Convert, Record, Remove, Replace, Spec
from iskd.refits import refit_survivors, training_tokens
from iskd.refits.base import RefitTask
from iskd.refits.calibrate import Calibrate, _attended, _statistics
from iskd.refits.local import Local
from iskd.refits.output import Output
from iskd.schedules import ConvertTo, History
from iskd.schedules.align import Align
from tests.factories import louder, mixer_specs, sampled, text_of, tiny, tiny_teacher, windows

SPECS = mixer_specs()
LAYERS = (0, 2)
# gates that hold a memory; the others have none, or one of their own making
WITH_DECAY = ("gla", "metala", "hgrn2", "rwkv6", "mlstm", "mamba2", "gated_deltanet", "kda")


def converted(name: str, family: str = "llama", **kwargs: Any) -> tuple[Any, Any, RefitTask]:
    teacher = louder(tiny(family, initializer_range=0.2))
    student, spec = copy.deepcopy(teacher), SPECS[name]
    edits = [Convert(layer, Spec(spec.target, {**spec.kwargs, **kwargs}), seed=layer) for layer in LAYERS]
    record = surgery.apply(student, Record(4), edits)
    text = list(windows(6, 16, seed=5).split(3))
    return student, teacher, RefitTask(student, teacher, record, edits, text[:1], text[1:])


def mixer_at(student: Any, layer: int) -> Any:
    stack = Stack(student)
    return stack.layers[layer].get_submodule(f"{stack.family.attn}.mixer")


def decays(mixer: Any) -> Tensor:
    """Decay by head on a stream of zeros, where only biases speak."""
    found: list[Tensor] = []
    mixer.mix, mix = (lambda streams, *_: (found.append(streams.g), (streams.v, streams.v))[1]), mixer.mix
    mixer(torch.zeros(1, 1, 48))
    mixer.mix = mix
    g = found[0][0, 0]
    return g if g.dim() == 1 else g.mean(-1)


@torch.no_grad()
def test_look_back_and_entropy_are_those_of_the_rows() -> None:
    _, teacher, task = converted("gla")
    reach, entropy = _attended(task, LAYERS)
    with attention_weights(Stack(teacher)):
        every = teacher(task.fit[0], output_attentions=True).attentions
    for index, layer in enumerate(LAYERS):
        for head in range(6):
            total, back, spread = 0.0, 0.0, 0.0
            for rows in every[layer][:, head]:
                for t in range(2, 16):
                    row = rows[t, 1 : t + 1].double()
                    share = row / row.sum()
                    total += row.sum()
                    back += row.sum() * (share * torch.arange(t - 1, -1, -1)).sum()
                    spread += row.sum() * torch.special.entr(share).sum() / math.log(t)
            assert reach[index, head].item() == pytest.approx(float(back / total), rel=1e-5)
            assert entropy[index, head].item() == pytest.approx(float(spread / total), rel=1e-5)


@torch.no_grad()
def test_every_document_of_a_window_has_a_first_token_of_its_own() -> None:
    """Two documents in a window are as two windows; windows without a pair to look at tell nothing."""
    torch.manual_seed(0)
    alone = [torch.rand(1, 6, tokens, tokens).tril() for tokens in (7, 9)]
    together = torch.zeros(1, 6, 16, 16)
    together[..., :7, :7], together[..., 7:, 7:] = alone
    places = torch.tensor([[*range(7), *range(9)]])
    apart = sum(_statistics(each, torch.arange(each.shape[-1])[None]) for each in alone)
    torch.testing.assert_close(_statistics(together, places), apart)
    _, _, task = converted("gla")
    with pytest.raises(ValueError, match=r"windows of 2 tokens tell nothing of its gates; raise data\.seq_len"):
        Calibrate(tokens=64, held_tokens=32).refit(dataclasses.replace(task, fit=[windows(4, 2)]))


@pytest.mark.parametrize("name", WITH_DECAY)
@torch.no_grad()
def test_half_is_forgotten_after_the_mean_look_back(name: str) -> None:
    student, _, task = converted(name)
    reach, entropy = _attended(task, LAYERS)
    told = Calibrate(scale=False).refit(task)
    assert told[0].startswith("of 2 mixers ")
    assert " of 2 set: heads of the teacher look back" in told[0]
    for index, layer in enumerate(LAYERS):
        wanted = -(math.log(2) / reach[index].clamp_min(0.5)).float()  # half a token is the least
        if name == "hgrn2":
            wanted = wanted.clamp_min(math.log(0.5 + 0.0005))
        if name != "mlstm" or wanted.max() < -1e-4:
            torch.testing.assert_close(decays(mixer_at(student, layer)), wanted, rtol=2e-2, atol=1e-3)
        if hasattr(mixer_at(student, layer), "beta"):
            beta = torch.sigmoid(mixer_at(student, layer).beta.bias)
            torch.testing.assert_close(beta, (0.3 + 0.4 * (1 - entropy[index])).float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_heads_come_to_the_size_of_the_teachers() -> None:
    """Linear attention with values ten times too large: every head goes down by about ten, whatever it says."""
    student, teacher, task = converted("linear_attention")
    same = copy.deepcopy(student)
    for layer in LAYERS:
        mixer_at(student, layer).projections.v_proj.weight.mul_(5)
    before = [mixer_at(student, layer).projections.o_proj.weight.clone() for layer in LAYERS]
    Calibrate().refit(task)
    plain = RefitTask(same, teacher, task.record, task.edits, task.fit, task.held)
    Calibrate().refit(plain)
    for layer, old in zip(LAYERS, before, strict=True):
        new = mixer_at(student, layer).projections.o_proj.weight
        factor = (new / old).unflatten(1, (6, 8))
        assert torch.allclose(factor, factor[:1, :, :1].expand_as(factor), rtol=1e-3), "one number a head"
        inside = (factor[0, :, 0] > 0.11) & (factor[0, :, 0] < 1.9)
        own = (mixer_at(same, layer).projections.o_proj.weight / old).unflatten(1, (6, 8))[0, :, 0]
        torch.testing.assert_close(5 * factor[0, inside, 0], own[inside], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_every_mixer_can_be_calibrated(name: str) -> None:
    """Also with heads of its own number; what there is nothing for is left alone."""
    student, _, task = converted(name, "gpt2", heads=3)
    Calibrate().refit(task)
    assert student(windows()).logits.isfinite().all()


@torch.no_grad()
def test_a_mixer_of_an_attention_that_lost_heads_is_left_alone() -> None:
    """Which heads of the teacher are gone nobody knows any more: the others of the run are calibrated."""
    teacher = louder(tiny("llama"))
    student = copy.deepcopy(teacher)
    edits = [
        Replace(1, Spec("iskd.blocks.slim.Slim", {"ratio": 0.3})),
        Convert(1, SPECS["gla"]),
        Convert(2, SPECS["gla"]),
    ]
    record = surgery.apply(student, Record(4), edits)
    before = {name: value.clone() for name, value in student.named_parameters()}
    refit = Calibrate(tokens=64, held_tokens=32)
    told = refit.refit(RefitTask(student, teacher, record, edits, list(windows(4, 16).split(2)), []))
    assert told[0] == "mixers of layers 1 stay as they are: their attention had lost some of its heads before"
    assert told[1].startswith("of 1 mixers ")
    changed = {name.split(".")[2] for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"2"}
    record = surgery.apply(student := copy.deepcopy(teacher), Record(4), edits[:2])
    assert len(refit.refit(RefitTask(student, teacher, record, edits[:2], list(windows(4, 16).split(2)), []))) == 1


def test_without_a_mixer_there_is_nothing_to_do() -> None:
    teacher = tiny("llama")
    student = copy.deepcopy(teacher)
    edits = [Remove(1)]
    record = surgery.apply(student, Record(4), edits)
    refit = Calibrate(tokens=64, held_tokens=32)
    told = refit_survivors([refit], student, teacher, record, edits, text_of(lambda n: [windows(n // 16, 16)], refit))
    assert told[0] == "refit calibrate: no mixer was put in: nothing to calibrate"
    with pytest.raises(ValueError, match="a refit needs calibration text"):
        Calibrate(tokens=0)
    with pytest.raises(ValueError, match="some to fit to and some held out"):
        refit_survivors([Calibrate()], student, teacher, record, edits, text_of([windows(1, 16)], Calibrate()))


def test_local_work_first_brings_a_conversion_near() -> None:
    """All three in order, on a teacher that has learnt something and its own text, before any training."""
    teacher = tiny_teacher()
    text = sampled(teacher, 24, 64)
    student, depth = copy.deepcopy(teacher), len(Stack(teacher).layers)
    edits = [Convert(layer, SPECS["gated_deltanet"], seed=layer) for layer in range(depth)]
    record = surgery.apply(student, Record(depth), edits)
    refits = [
        Calibrate(tokens=512, held_tokens=256),
        Output(tokens=1024, held_tokens=256, projections=["attention"]),
        Local(tokens=1024, held_tokens=256, sublayers=True, epochs=2, lr=5e-4, lr_new=2e-3),
    ]
    told = refit_survivors(refits, student, teacher, record, edits, text_of(lambda n: [text[: n // 64]], *refits))
    kls = [line.split("held-out KL ")[1] for line in told if "held-out KL" in line]
    first, last = float(kls[0].split(" -> ")[0]), float(kls[-1].split(" -> ")[1].split()[0])
    assert len(kls) == 3
    assert last < 0.6 * first, told


# ---- the share of the budget -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95])
def test_a_share_of_the_tokens_goes_to_local_work(share: float) -> None:
    schedule = Align(ConvertTo(SPECS["gla"]), tokens=1000, mixers=None, hidden=False, local_share=share)
    [stage] = schedule.candidates_for(History(Record(4)))
    assert (stage.refit_budget, stage.tokens) == (round(1000 * share), 1000 - round(1000 * share))
    three = Align(ConvertTo(SPECS["gla"]), tokens=1000, mixers="matrix", hidden=True, local_share=0.5)
    assert [stage.refit_budget for stage in three.stages] == [500, 0, 0]
    assert sum(stage.tokens for stage in three.stages) == 500


def test_a_share_that_leaves_nothing_is_refused() -> None:
    for values in ({"local_share": 1.0}, {"local_share": -0.1}, {"local_share": 0.95, "hidden_share": 0.1}):
        with pytest.raises(ValueError, match="local_share must be >= 0 and leave something for the last stage"):
            Align(ConvertTo(SPECS["gla"]), **values)


def test_the_budget_decides_how_much_text_refits_read() -> None:
    refits = [Output(tokens=8000, held_tokens=2000), Local(tokens=8000, held_tokens=2000, epochs=2)]
    asked = training_tokens(refits)
    # and three passes of whole models over the text held out, by which each is judged
    assert asked == (10_000 * (refits[0].passes + refits[1].passes) + 2 * 3 * 2000) / 4
    assert training_tokens(
        refits, text_of(lambda tokens: [windows(tokens // 2 // 100, 100)], *refits)
    ) == pytest.approx(asked / 2)
    assert training_tokens(refits, text_of(lambda tokens: [windows(2 * tokens // 100, 100)], *refits)) == asked
    fewer = [refit.on(2500 / asked) for refit in refits]
    assert training_tokens(fewer) == pytest.approx(2500, rel=1e-2)
    more = [refit.on(2 * asked / asked) for refit in refits]
    assert [refit.tokens for refit in more] == [16_000, 16_000]


@pytest.mark.parametrize(("share", "converted_layers"), [(0.25, 22), (0.5, 15), (0.01, 29)])
def test_a_share_of_the_layers_keeps_attention(share: float, converted_layers: int) -> None:
    schedule = Align(ConvertTo(SPECS["gla"]), attention_share=share, mixers=None, hidden=False)
    scores = {layer: float((layer * 7) % 30) for layer in range(30)}
    assert schedule.scoring == "once"
    [stage] = schedule.candidates_for(History(Record(30), scores=scores))
    layers = [edit.layer for edit in stage.edits]
    assert len(layers) == converted_layers
    assert {layer for layer in range(30) if layer not in layers} == set(
        sorted(scores, key=lambda layer: -scores[layer])[: 30 - converted_layers]
    )
    assert schedule.choice(History(Record(30))).number == converted_layers


def test_a_share_of_the_teachers_layers_keeps_attention_beside_other_edits() -> None:
    """Layers that went before keep none: those that the share asks for are left of the others."""
    schedule = Align(ConvertTo(SPECS["gla"]), attention_share=0.25, mixers=None, hidden=False)
    gone = tuple(Remove(layer) for layer in range(7))
    seen = History(Record(30).extended(gone), scores={layer: float(layer) for layer in range(7, 30)}, before=7)
    [stage] = schedule.candidates_for(seen)
    assert [edit.layer for edit in stage.edits] == list(range(7, 22)), "8 of the 30 are left, the highest"
    assert len({round(share * 50) for share in (0.14, 0.28, 0.56)}) == 3
    for share in (0.14, 0.28, 0.56):  # as floats a little more than a whole number of layers
        exact = Align(ConvertTo(SPECS["gla"]), attention_share=share, mixers=None, hidden=False)
        [stage] = exact.candidates_for(History(Record(50), scores=dict.fromkeys(range(50), 0.0)))
        assert len(stage.edits) == 50 - round(50 * share)


def test_a_share_of_attention_that_cannot_be_is_refused() -> None:
    convert = ConvertTo(SPECS["gla"])
    with pytest.raises(ValueError, match=r"schedule.attention_share=1.0 must be in \(0, 1\)"):
        Align(convert, attention_share=1.0)
    with pytest.raises(ValueError, match="are two targets"):
        Align(convert, attention_share=0.5, count=3)
    most = History(Record(4).extended([Remove(0), Remove(1)]), scores={2: 0.0, 3: 1.0}, before=2)
    with pytest.raises(ValueError, match="of 4 layers, 2 of which are edited otherwise, leaves none to convert"):
        Align(convert, attention_share=0.5).candidates_for(most)
    with pytest.raises(ValueError, match="leaves none to convert"):
        Align(convert, attention_share=0.9).candidates_for(History(Record(4), scores=dict.fromkeys(range(4), 0.0)))

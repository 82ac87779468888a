"""Which layers keep their attention: restoring one at a time, and gates that all layers pay for together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.commands import compose
from iskd.commands.build import importance_of
from iskd.commands.compose import compose_config
from iskd.data import framing_of
from iskd.importance.base import AttentionImportance, repeated
from iskd.importance.gates import Gates
from iskd.importance.restore import Restore
from iskd.models import Stack, scoring, surgery
from iskd.plan import Convert, Record, Remove, Replace, Spec
from iskd.schedules.edits import ConvertTo, ReplaceWith
from tests.factories import digest, hooks, modes, tiny, windows

MIXER = Spec("iskd.mixers.sliding.Sliding", {"window": 2, "sinks": 1, "feature_map": "none"})
GLA = Spec("iskd.mixers.gla.GLA", {"chunk": 8})
BATCHES = [windows(3, 16, seed=1), windows(2, 16, seed=2)]


def teacher_of(family: str = "llama", layers: int = 4, **config: Any) -> PreTrainedModel:
    """Louder attention than a random model's own, so that what it gives is told from rounding."""
    model = tiny(family, layers=layers, initializer_range=0.2, **config)
    return model


def converted(teacher: PreTrainedModel, mixer: Spec, but: tuple[int, ...] = (), seed: int = 0) -> PreTrainedModel:
    """All layers of a copy but some, as the run's own edits would make them."""
    model, edit = copy.deepcopy(teacher), ConvertTo(mixer)
    layers = [layer for layer in range(len(Stack(model).layers)) if layer not in but]
    surgery.apply(model, Record(len(Stack(model).layers)), [edit.make(layer, seed) for layer in layers])
    return model


@torch.no_grad()
def divergence(teacher: PreTrainedModel, student: PreTrainedModel, batch: Tensor, stride: int) -> Tensor:
    said, own = (model(batch).logits[:, ::stride].log_softmax(-1) for model in (teacher, student))
    return (said.exp() * (said - own)).sum(-1).mean(1)


@pytest.mark.parametrize(("family", "mixer"), [("llama", MIXER), ("gpt2", GLA), ("phi", MIXER)])
def test_a_restored_layer_is_the_student_with_that_attention_put_back(family: str, mixer: Spec) -> None:
    """The reference builds a student for every layer; stride and the trunk change nothing."""
    teacher = teacher_of(family)
    rows = Restore(stride=2, convert=ConvertTo(mixer), seed=3).rows(teacher, teacher, BATCHES)
    whole = converted(teacher, mixer, seed=3)
    for layer in range(4):
        back = converted(teacher, mixer, but=(layer,), seed=3)
        gains = [divergence(teacher, whole, b, 2) - divergence(teacher, back, b, 2) for b in BATCHES]
        torch.testing.assert_close(rows[layer], torch.cat(gains), atol=1e-5, rtol=1e-4)


def test_later_rounds_measure_what_is_left_to_gain() -> None:
    teacher = teacher_of(layers=5)
    asked = Restore(rounds=2, stride=1, convert=ConvertTo(MIXER)).choosing(range(5), 3, range(5))
    scores = asked(teacher, teacher, BATCHES)
    once = Restore(stride=1, convert=ConvertTo(MIXER))(teacher, teacher, BATCHES)
    first = int(once.argmax())
    assert int(scores.argmax()) == first, "who is best alone is kept first"
    kept = converted(teacher, MIXER, but=(first,))
    for layer in set(range(5)) - {first}:
        both = converted(teacher, MIXER, but=(first, layer))
        gains = [divergence(teacher, kept, b, 1) - divergence(teacher, both, b, 1) for b in BATCHES]
        assert scores[layer].item() == pytest.approx(torch.cat(gains).mean().item(), abs=1e-5)


def test_text_that_repeats_itself_is_scored_where_it_does() -> None:
    teacher = teacher_of()
    rows = Restore("recall", stride=1, convert=ConvertTo(MIXER)).rows(teacher, teacher, BATCHES[:1])
    once = BATCHES[0].flatten()[:48].view(-1, 8)
    twice = torch.cat([once, once], dim=1)

    @torch.no_grad()
    def loss(model: PreTrainedModel) -> Tensor:
        said = model(twice).logits[:, 8:-1].log_softmax(-1)
        return -said.gather(2, twice[:, 9:, None]).mean((1, 2))

    whole = loss(converted(teacher, MIXER))
    for layer in range(4):
        torch.testing.assert_close(
            rows[layer], whole - loss(converted(teacher, MIXER, but=(layer,))), atol=1e-5, rtol=0
        )


def test_repeated_windows_hold_no_separator() -> None:
    batch = torch.tensor([[3, 4, 0, 5, 6, 7, 8, 9], [0, 10, 11, 12, 13, 14, 15, 16]])
    [found] = repeated([batch], 0)
    assert found.tolist() == [[*half, *half] for half in ([3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14])]
    with pytest.raises(ValueError, match=r"metric=recall says half a window twice, got a batch \[2, 3\]"):
        repeated([batch[:, :3]], None)


@pytest.mark.parametrize("width", [7, 8])
@pytest.mark.parametrize("separator", [None, 1], ids=["", "apart by the same token"])
@pytest.mark.parametrize("rows", [1, 2])
def test_repeated_windows_begin_as_all_do(rows: int, separator: int | None, width: int) -> None:
    """`data.bos=window`: a begin token in the middle of a window would be text that no training window holds."""
    batch = torch.arange(rows * width).view(rows, width) + 10
    batch[:, 0] = 1
    half = (width - 1) // 2
    [found] = repeated([batch], separator, (1,))
    assert found.shape[1] == 2 * half + 1
    assert (found[:, 0] == 1).all()
    assert not (found[:, 1:] == 1).any()
    assert torch.equal(found[:, 1 : half + 1], found[:, half + 1 :])
    # the metrics read the second half alone: its first token is nobody's label
    restore = Restore(metric="recall")
    restore.begin = (1,)
    assert restore._text(found, copier()).at.start == half + 1


WHOLE = {"restore": Restore, "gates": Gates}


@pytest.mark.parametrize(
    ("name", "metric", "keys", "seen"),
    [
        ("restore", "kl", {"window": 16, "sinks": 1}, 17),
        ("restore", "kl", {"window": 12, "sinks": 4}, 16),  # every token but the first ones is in the window
        ("gates", "kl", {"window": 15, "sinks": 1}, 16),
        ("gates", "kl", {"window": 20, "sinks": 0, "conv": 3}, 20),  # a convolution starts as the identity
        ("gates", "recall", {"window": 8, "sinks": 1}, 8),
        ("restore", "recall", {"window": 10, "sinks": 4}, 10),
    ],
)
def test_windows_that_miss_nothing_of_the_text_are_refused(
    name: str, metric: str, keys: dict[str, Any], seen: int
) -> None:
    """All layers would be alike but for rounding, and which of them are converted an accident."""
    teacher, mixer = teacher_of(), Spec(MIXER.target, {**MIXER.kwargs, **keys})
    with pytest.raises(ValueError, match=rf"{name}: mixers that see {seen} tokens are .* lower mixer.window"):
        WHOLE[name](metric, convert=ConvertTo(mixer))(teacher, teacher, BATCHES)
    with pytest.raises(ValueError, match=r"lower importance\.stand_in"):
        WHOLE[name](metric, convert=ConvertTo(GLA), stand_in=16)(teacher, teacher, BATCHES)
    beside = ConvertTo(mixer, {"other": (MIXER, [1])})
    assert WHOLE[name](metric, convert=beside)(teacher, teacher, BATCHES).isfinite().all()


@pytest.mark.parametrize(
    ("family", "metric", "keys"),
    [
        ("llama", "kl", {"window": 6, "sinks": 4}),
        ("llama", "recall", {"window": 7, "sinks": 4}),
        ("llama", "kl", {"window": 32, "init": "random"}),
        ("llama", "kl", {"window": 32, "rotary": False}),
        ("llama", "kl", {"window": 32, "conv": 2, "conv_activation": "silu"}),
        ("mistral", "kl", {"window": 16, "sinks": 4}),  # its own layers see 8 tokens
        ("gemma2", "kl", {"window": 16, "sinks": 4}),  # half of them do
    ],
)
def test_windows_that_change_the_attention_are_scored(family: str, metric: str, keys: dict[str, Any]) -> None:
    own = {} if family == "llama" else {"sliding_window": 8}
    teacher, mixer = teacher_of(family, **own), Spec(MIXER.target, {**MIXER.kwargs, **keys})
    rows = Restore(metric, convert=ConvertTo(mixer))(teacher, teacher, BATCHES)
    assert rows.abs().max() > 1e-6


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("keys", [{"window": 12, "sinks": 4}, {"window": 11, "sinks": 4}, {"window": 6, "sinks": 2}])
def test_a_mixer_is_the_attention_itself_as_far_as_it_says(family: str, keys: dict[str, Any]) -> None:
    teacher = teacher_of(family, **({"sliding_window": 8} if family in ("gemma2", "mistral") else {}))
    mixer = Spec(MIXER.target, {**keys, "feature_map": "none"})
    student, stack = converted(teacher, mixer), Stack(teacher)
    exact = min(block.get_submodule(f"{stack.family.attn}.mixer").exact for block in Stack(student).layers)
    at = [(teacher(BATCHES[0][:, :n]).logits - student(BATCHES[0][:, :n]).logits).abs().max() for n in (exact, 16)]
    assert at[0] < 1e-3
    assert exact == 16 or at[1] > 1e-2


@pytest.mark.parametrize("kind", [Restore, Gates])
def test_windows_stand_for_mixers_that_have_yet_to_learn(kind: Any) -> None:
    teacher = teacher_of()
    window = Spec(MIXER.target, {"window": 3, "sinks": 3, "feature_map": "none"})
    expected = kind("kl", convert=ConvertTo(window))(teacher, teacher, BATCHES)
    found = kind("kl", convert=ConvertTo(GLA), stand_in=3)(teacher, teacher, BATCHES)
    assert torch.equal(found, expected)
    assert not torch.equal(found, kind("kl", convert=ConvertTo(GLA))(teacher, teacher, BATCHES))
    own = [kind("kl", convert=ConvertTo(MIXER), stand_in=size)(teacher, teacher, BATCHES) for size in (None, 3)]
    assert torch.equal(*own), "a mixer that is attention in its window stands for itself"


@pytest.mark.parametrize("name", ["restore", "gates"])
def test_what_stands_at_the_head_of_windows_is_the_runs(name: str, tmp_path: Path) -> None:
    words = ["model=tiny", "data=sample", "data.seq_len=32", "data.bos=window", f"importance={name}", "trainer=cpu"]
    words += ["experiment=subquadratic", "schedule.attention_share=0.25", "schedule.tokens=256"]
    made = compose.parts(words, tmp_path)
    assert made.importance.begin == framing_of(made.teacher.tokenizer, "window").window != ()


def copier() -> PreTrainedModel:
    """A model of two layers that recalls by its second attention alone: induction of tokens, written by hand."""
    model: Any = teacher_of(layers=3)
    with torch.no_grad():
        for layer in (0, 2):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.get_submodule(f"model.layers.{layer}.{name}").weight.zero_()
    return model


@pytest.mark.parametrize("metric", ["kl", "recall"])
def test_gates_open_where_attention_is_missed(metric: str) -> None:
    """Layers that add nothing to the stream need no attention, whatever they hold."""
    teacher = copier()
    gates = Gates(metric, steps=6, lr=0.3, convert=ConvertTo(MIXER)).choosing(range(3), 2, range(4))
    scores = gates(copy.deepcopy(teacher), teacher, BATCHES)
    assert ((scores > 0) & (scores < 1)).all()
    if metric == "kl":
        assert int(scores.argmax()) == 1
        assert scores[0] == pytest.approx(scores[2].item(), abs=1e-4), "nothing but the penalty pulls at these"


def test_gates_keep_to_the_share() -> None:
    teacher = copier()
    for number, most in ((1, 0.75), (2, 0.5)):
        gates = Gates(steps=8, lr=0.3, penalty=50.0, convert=ConvertTo(MIXER)).choosing(range(3), number, range(4))
        assert gates(teacher, teacher, BATCHES).mean() < most


def made(kind: Any, mixer: Spec) -> AttentionImportance:
    return kind(convert=ConvertTo(mixer), **({"steps": 3} if kind is Gates else {}))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Restore, Gates])
def test_models_are_left_as_they_were(kind: Any) -> None:
    teacher = teacher_of(dropout=0.3)
    student = copy.deepcopy(teacher).train()
    blocks = list(Stack(student).layers)
    frozen = [*Stack(student).layers[2].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    models = (student, teacher)
    before, state = [(digest(m), modes(m), hooks(m)) for m in models], torch.get_rng_state()
    first, again = (made(kind, GLA)(student, teacher, BATCHES[:1]) for _ in range(2))
    assert torch.equal(first, again)
    assert [(digest(m), modes(m), hooks(m)) for m in models] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [*Stack(student).layers] == blocks
    assert {id(p) for p in student.parameters() if not p.requires_grad} == {id(p) for p in frozen}
    assert all(p.grad is None for model in models for p in model.parameters())


@pytest.mark.parametrize("kind", [Restore, Gates])
def test_blocks_without_an_attention_of_their_own_stay_as_they_are(kind: Any) -> None:
    """A student with a gap, a foreign block and a converted one: the others are in question."""
    teacher = tiny("llama", layers=6)
    student = copy.deepcopy(teacher)
    bottleneck = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 3})
    surgery.apply(student, Record(6), [Replace(0, bottleneck), Remove(1), Convert(2, GLA)])
    scores = made(kind, MIXER)(student, teacher, BATCHES[:1])
    assert scores.shape == (5,)
    assert scores.isfinite().all()
    with scoring(student), pytest.raises(ValueError, match="no block that may be converted has an attention"):
        kind(convert=ConvertTo(MIXER)).choosing([0, 1], 1, [0, 2, 3, 4, 5]).rows(student, teacher, BATCHES)


def test_behind_a_gap_a_layer_is_scored_with_its_own_mixer() -> None:
    """Numbers of layers say which mixer a layer gets and what its fresh weights are, not places in the stack."""
    student = teacher_of(layers=5)
    surgery.apply(student, Record(5), [Remove(1)])
    convert = ConvertTo(MIXER, {"gla": (GLA, "odd")})
    asked = Restore(convert=convert, seed=3).choosing(range(4), 2, (0, 2, 3, 4))
    _, blocks = asked.in_question(student, 16)
    edits = {at: convert.make(layer, 3) for at, layer in enumerate((0, 2, 3, 4))}
    stack = Stack(student)
    for at, block in blocks.items():
        made = surgery.build_converted(stack, stack.layers[at], edits[at])  # type: ignore[arg-type]
        assert digest(block) == digest(made)
    kinds = [type(block.get_submodule("self_attn.mixer")).__name__ for _, block in sorted(blocks.items())]
    assert kinds == ["Sliding", "Sliding", "GLA", "Sliding"]


@pytest.mark.parametrize("kind", [Restore, Gates])
def test_without_a_conversion_there_is_nothing_to_score(kind: Any) -> None:
    teacher = tiny("llama")
    for convert in (None, ReplaceWith(Spec("iskd.blocks.linear.Linear", {}))):
        with pytest.raises(ValueError, match="it needs edit=convert and a mixer"):
            kind(convert=convert)(teacher, teacher, BATCHES)


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (Restore, {"metric": "acc"}, "importance.metric='acc' is unknown: choose kl, loss, recall"),
        (Restore, {"rounds": 0}, "importance.rounds must be at least 1, got 0"),
        (Restore, {"cache_mb": -1}, "importance.cache_mb must not be negative"),
        (Gates, {"metric": "loss"}, "importance.metric='loss' is unknown: choose recall or kl"),
        (Gates, {"steps": 0}, "importance.steps must be at least 1"),
        (Gates, {"share": 1.5}, r"a share in \(0, 1\)"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(kind: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**kwargs)


def test_the_command_line_gives_them_the_edits_of_the_run() -> None:
    for name in ("restore", "gates"):
        made = importance_of(compose_config([f"importance={name}", "edit=convert", "mixer=window", "seed=5"])[0])
        assert isinstance(made, AttentionImportance)
        assert made.seed == 5
        assert isinstance(made.convert, ConvertTo)
        assert made.convert.mixer.kwargs["feature_map"] == "none"

"""Laws of mixers, for every mixer in conf/mixer, and what its keys make of it, inside every family."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import iskd
from iskd.export.student import write
from iskd.mixers.base import Context
from iskd.mixers.modules import Rotary
from iskd.models import CacheSlot, Stack, surgery
from iskd.models.cache import StateLayer, cache_held_bytes
from iskd.plan import Convert, Record, Remove, Replace, Spec
from tests.factories import FAMILIES, conf_group, louder, mixer_specs, mixer_variants, padded, tiny, windows
from tests.laws import check_beams, check_cache, check_generation, check_padding, check_past, generate, logits, same

VARIANTS = mixer_variants()
SPECS = {**mixer_specs(), **VARIANTS}
LINEAR = "iskd.mixers.linear_attention.LinearAttention"
LAYERS = (0, 2)
# laws about hosts: two mixers, one grouped and one with gates, in every family, all others in two, variants in one
WIDE = ("linear_attention", "gla")
EVERY = [
    pytest.param(family, name, id=f"{family}-{name}")
    for name in SPECS
    for family in (FAMILIES if name in WIDE else ("llama",) if name in VARIANTS else ("llama", "gpt2"))
]


def converted(family: str, spec: Spec, layers: tuple[int, ...] = LAYERS, **config: Any) -> PreTrainedModel:
    model = tiny(family, **config)
    surgery.apply(model, Record(4), [Convert(layer, spec, seed=layer) for layer in layers])
    return louder(model)


@cache
def student(family: str, name: str) -> PreTrainedModel:
    """Shared by the tests below, which must not change it; float64, so that equal means equal."""
    return converted(family, SPECS[name]).double()


def padded_student(family: str, name: str) -> PreTrainedModel:
    """The same, but for Gemma 2, whose attention is transformers' own: in float64 that makes padding NaN."""
    return converted(family, SPECS[name]) if family == "gemma2" else student(family, name)


def with_(name: str, **kwargs: Any) -> Spec:
    return Spec(SPECS[name].target, {**SPECS[name].kwargs, **kwargs})


def mixers(model: PreTrainedModel, layers: tuple[int, ...] = LAYERS) -> list[nn.Module]:
    stack = Stack(model)
    return [stack.layers[layer].get_submodule(stack.family.attn) for layer in layers]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the mixing ------------------------------------------------------------------------------------------------------


def mixer_of(name: str, family: str = "llama") -> Any:
    """The first mixer of a model, in float64."""
    return copy.deepcopy(mixers(student(family, name))[0].get_submodule("mixer"))


def exact(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-7)


# two documents in a row, the second row padded on the left
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5], [1, 1, 1, 0, 1, 2, 3, 4, 5, 6, 7]])
MASK = torch.tensor([[1] * 11, [0] * 3 + [1] * 8])


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_a_pass_is_the_matrix_times_the_values(name: str) -> None:
    mixer, x = mixer_of(name), randn(2, 11, 48, seed=0)
    if not mixer.exposes_matrix:
        with pytest.raises(ValueError, match=f"{type(mixer).__name__} has no mixing matrix"):
            mixer.matrix(x)
        return
    for mask, positions in ((None, None), (MASK, POSITIONS)):
        context = Context.of(x, mask, positions)
        streams = mixer.streams(x, context).hiding(context.seen)
        mixed, _ = mixer.mix(streams, context)
        matrix = mixer.matrix(x, mask=mask, positions=positions)
        values = streams.v.repeat_interleave(mixed.shape[2] // streams.v.shape[2], dim=2)
        exact(torch.einsum("bhts,bshv->bthv", matrix, values), mixed)
        assert matrix.shape == (2, mixer.heads, 11, 11)
        assert not matrix.triu(1).any()
    assert matrix[0].abs().sum() > 0
    assert not matrix[0, :, 5:, :5].any(), "nothing crosses into the next document"
    assert not matrix[1, :, 3:, :3].any(), "nothing comes from padding"


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_documents_in_a_row_do_not_see_each_other(name: str) -> None:
    mixer, x = mixer_of(name), randn(2, 11, 48, seed=1)
    both = mixer(x, mask=MASK, positions=POSITIONS)
    exact(both[:1, :5], mixer(x[:1, :5]))
    exact(both[:1, 5:], mixer(x[:1, 5:]))
    exact(both[1:, 3:], mixer(x[1:, 3:]))


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_a_cache_without_positions_goes_on_rightly_or_not_at_all(name: str) -> None:
    """A mixer whose queries and keys turn anywhere says that it must be told where it is."""
    mixer, x, cache = mixer_of(name), randn(1, 9, 48, seed=4), DynamicCache()
    whole = mixer(x)
    mixer(x[:, :6], cache=CacheSlot(cache, 0))
    if mixer.turns:
        with pytest.raises(ValueError, match=f"{type(mixer).__name__} has rotary positions: it needs position_ids"):
            mixer(x[:, 6:], cache=CacheSlot(cache, 0))
    else:
        exact(mixer(x[:, 6:], cache=CacheSlot(cache, 0)), whole[:, 6:])
    assert mixer.turns == any(isinstance(part, Rotary) for part in vars(mixer).values())


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_a_cache_goes_on_with_the_last_document_alone(name: str) -> None:
    mixer, x = mixer_of(name), randn(1, 9, 48, seed=4)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    for read in (6, 7):  # one and two tokens of the second document
        both, alone = DynamicCache(), DynamicCache()
        mixer(x[:, :read], positions=positions[:, :read], cache=CacheSlot(both, 0))
        mixer(x[:, 5:read], positions=positions[:, 5:read], cache=CacheSlot(alone, 0))
        rest = {"positions": positions[:, read:]}
        exact(
            mixer(x[:, read:], **rest, cache=CacheSlot(both, 0)), mixer(x[:, read:], **rest, cache=CacheSlot(alone, 0))
        )


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_token_by_token_is_all_at_once(name: str) -> None:
    """Also in pieces, in every length of chunk, and behind padding."""
    mixer, x = mixer_of(name), randn(2, 11, 48, seed=2)
    positions = (MASK.cumsum(1) - 1).clamp_min(0)
    whole = mixer(x, mask=MASK, positions=positions)
    for lengths in ([1] * 11, [6, 1, 4], [4, 7]):
        cache, outputs, seen = DynamicCache(), [], 0
        for piece, at in zip(x.split(lengths, dim=1), positions.split(lengths, dim=1), strict=True):
            seen += piece.shape[1]
            outputs.append(mixer(piece, mask=MASK[:, :seen], positions=at, cache=CacheSlot(cache, 0)))
        exact(torch.cat(outputs, dim=1)[MASK.bool()], whole[MASK.bool()])
    for mixer.chunk in (1, 3, 64):
        exact(mixer(x, mask=MASK, positions=positions)[MASK.bool()], whole[MASK.bool()])


@pytest.mark.parametrize("name", SPECS)
def test_every_part_is_accounted_for(name: str) -> None:
    mixer: Any = converted("llama", SPECS[name]).get_submodule("model.layers.0.self_attn.mixer")
    lines = dict(line.split(" ", 1) for line in mixer.report)
    own = {key.removeprefix("projections.").split(".")[0] for key, _ in mixer.named_parameters()}
    assert own | {f"{name}_proj" for name in "qkvo"} <= set(lines)
    known = ("copied", "fresh: ", "dropped: ", "not used: ")
    assert all(line.startswith(known) for line in lines.values()), lines
    assert lines["o_proj"] == "copied"
    drawn: Any = converted("llama", with_(name, init="random")).get_submodule("model.layers.0.self_attn.mixer")
    assert "o_proj fresh: mixer.init=random" in drawn.report
    assert {key: p.shape for key, p in drawn.named_parameters()} == {
        key: p.shape for key, p in mixer.named_parameters()
    }
    with pytest.raises(ValueError, match=r"mixer\.init='guess': choose one of copy, random"):
        converted("llama", with_(name, init="guess"))


@pytest.mark.parametrize("name", SPECS)
def test_heads_may_be_regrouped(name: str) -> None:
    model = converted("llama", with_(name, heads=3))
    assert mixers(model)[0].get_submodule("mixer").heads == 3
    check_cache(model)
    with pytest.raises(
        ValueError, match=r"mixer.heads=5 does not divide the 48 channels of the attention \(6 heads of 8"
    ):
        converted("llama", with_(name, heads=5))


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_a_fresh_mixer_disturbs_no_more_than_no_mixer(name: str) -> None:
    """What a mixer writes before it has learnt anything is hardly larger than what the attention wrote."""
    model = tiny("llama")
    attention = Stack(model).layers[0].get_submodule(Stack(model).family.attn)
    x = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
    turn = Stack(model).base.get_submodule("rotary_emb")(x, torch.arange(32)[None])
    hidden = torch.full((32, 32), -1e30).triu(1)[None, None]
    own = attention(x, position_embeddings=turn, attention_mask=hidden)[0]
    surgery.apply(model, Record(4), [Convert(0, SPECS[name])])
    new = mixers(model, (0,))[0](x)[0]
    assert new.square().mean().sqrt() < 1.5 * own.square().mean().sqrt()


# ---- inside a host ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_the_future_does_not_change_the_past(family: str, name: str) -> None:
    check_past(student(family, name))


@pytest.mark.parametrize(("family", "name"), EVERY)
@torch.no_grad()
def test_a_mixer_mixes(family: str, name: str) -> None:
    """The last output depends on the first token through the mixer alone."""
    mixer = mixers(student(family, name))[0]
    x = randn(1, 9, 48, seed=0)
    other = torch.cat([randn(1, 1, 48, seed=1), x[:, 1:]], dim=1)
    assert (mixer(x)[0][:, -1] - mixer(other)[0][:, -1]).abs().max() > 1e-6


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_padding_does_not_enter_the_state(family: str, name: str) -> None:
    model = padded_student(family, name)
    check_padding(model)
    right = torch.arange(16).expand(2, 16) < torch.tensor([[16], [9]])
    same(logits(model, windows(), attention_mask=right.long())[1:, :9], logits(model, windows()[1:, :9]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_of_eager_attention_is_read_too(family: str) -> None:
    check_padding(converted(family, SPECS["gla"], attn_implementation="eager"))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_a_cache_changes_nothing(family: str, name: str) -> None:
    check_cache(student(family, name))


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("opt", {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
        ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
        ("phi", {"qk_layernorm": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
        ("llama", {"kv_heads": 1}),
        ("llama", {"kv_heads": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("mistral", {"sliding_window": 5}),
    ],
)
def test_variants_of_a_family_host_every_mixer(family: str, config: dict[str, Any], name: str) -> None:
    model = converted(family, SPECS[name], (0, 1, 3), **config).double()
    check_cache(model)
    check_generation(model, (9, 7))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_generation_with_a_cache_is_generation_without(family: str, name: str) -> None:
    check_generation(padded_student(family, name))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_beams_carry_the_state_with_them(family: str, name: str) -> None:
    check_beams(padded_student(family, name))


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_the_state_does_not_grow(name: str) -> None:
    model = converted("llama", SPECS[name], (0, 1, 2, 3))
    sizes = []
    for tokens in (3, 16):
        past = model(windows(2, tokens), use_cache=True).past_key_values
        assert all(isinstance(layer, StateLayer) for layer in past.layers)
        assert past.get_seq_length() == tokens
        sizes.append([tensor.shape for layer in past.layers for tensor in layer.state])
        assert all(tensor.dtype == torch.float32 for layer in past.layers for tensor in layer.state)
    assert sizes[0] == sizes[1]


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_every_parameter_learns(family: str, name: str) -> None:
    model, ids = converted(family, SPECS[name]), windows(4, 16)
    model(ids, labels=ids).loss.backward()
    for mixer in mixers(model):
        still = [key for key, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not still


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_a_record_rebuilds_the_same_structure(family: str, name: str) -> None:
    teacher = tiny(family)
    slim = Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})
    edits = [Convert(0, SPECS[name], seed=3), Remove(1), Replace(3, slim), Convert(3, SPECS[name])]
    at_once, one_by_one_ = copy.deepcopy(teacher), copy.deepcopy(teacher)
    record, stepwise = surgery.apply(at_once, Record(4), edits), Record(4)
    for edit in edits:
        stepwise = surgery.apply(one_by_one_, stepwise, [edit])
    assert record == stepwise
    shapes = {key: value.shape for key, value in at_once.state_dict().items()}
    assert all(torch.equal(value, at_once.state_dict()[key]) for key, value in one_by_one_.state_dict().items())
    rebuilt = surgery.rebuild(teacher, record)
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == shapes
    rebuilt.load_state_dict(at_once.state_dict())
    assert torch.equal(logits(rebuilt.eval(), windows()), logits(at_once, windows()))
    meta = surgery.rebuild(teacher, record, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {key: value.shape for key, value in meta.state_dict().items()} == shapes
    check_cache(at_once)


@pytest.mark.parametrize("name", SPECS)
def test_a_converted_student_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    teacher, model = tiny("qwen3"), tiny("qwen3")
    record = surgery.apply(model, Record(4), [Convert(0, SPECS[name]), Remove(2), Convert(3, SPECS[name])])
    write(tmp_path, model, record, teacher.config)
    loaded = iskd.load(tmp_path)
    assert torch.equal(logits(loaded, windows()), logits(model, windows()))
    ids, mask, _ = padded((6, 3))
    texts = [generate(m, cached=True, ids=ids, mask=mask).sequences for m in (loaded, model)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", mixer_specs())
def test_a_yaml_shows_what_every_mixer_takes(name: str) -> None:
    """All keys of a yaml are taken, or no mixer above were built; some every yaml shows."""
    assert {"init", "heads", "chunk"} <= set(conf_group("mixer")[name])


@pytest.mark.parametrize("name", SPECS)
def test_the_memory_behind_a_state_does_not_grow_with_the_prompt(name: str) -> None:
    """Parts of a prompt that go into the cache as views would keep all of it."""
    model = converted("llama", SPECS[name], (0, 1, 2, 3))
    held = []
    for tokens in (40, 60):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=windows(1, tokens), past_key_values=cache, use_cache=True)
        held.append(cache_held_bytes(cache))
    assert held[0] == held[1]

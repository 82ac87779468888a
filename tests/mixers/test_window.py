"""Softmax in a window, with sinks and with linear attention behind it, against sums written out query by query."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from iskd.mixers.mlstm import MLSTMWindow
from iskd.mixers.ops.window import places
from iskd.mixers.sliding import Sliding
from iskd.models import CacheSlot, Stack, surgery
from iskd.models.cache import cache_bytes
from iskd.plan import Convert, Record, Spec
from tests.factories import FAMILIES, louder, tiny, windows
from tests.mixers.test_mixer_kinds import agree, fresh, made, projected, randn


def hedgehog(weight: Tensor, x: Tensor) -> Tensor:
    return torch.cat([torch.softmax(x @ weight, -1), torch.softmax(-(x @ weight), -1)])


def sliding(mixer: Any, x: Tensor) -> Tensor:
    """Query by query over all keys: softmax weights in the window, features behind it, one sum for both."""
    q, k, v = (projected(mixer, name, x) for name in "qkv")
    gamma, w = torch.sigmoid(mixer.window_gate) if mixer.linear else None, mixer.window
    rows = []
    for b in range(x.shape[0]):
        outputs = []
        for t in range(x.shape[1]):
            heads = []
            for h in range(6):
                g = h // 2
                near = [s for s in range(t + 1) if s > t - w or s < mixer.sinks]
                scores = torch.stack([q[b, t, h] @ k[b, s, g] / 8**0.5 for s in near])
                total = x.new_zeros(t + 1)
                total[near] = torch.exp(scores - scores.max()) * (gamma[h] if gamma is not None else 1)
                for s in set(range(t + 1)) - set(near):
                    if mixer.feature_map == "hedgehog":
                        features = (
                            hedgehog(mixer.q_map.weight[h], q[b, t, h]),
                            hedgehog(mixer.k_map.weight[g], k[b, s, g]),
                        )
                        total[s] = features[0] @ features[1]
                    elif mixer.feature_map == "elu1":
                        total[s] = (F.elu(q[b, t, h]) + 1) @ (F.elu(k[b, s, g]) + 1)
                heads.append(total @ v[b, : t + 1, g] / total.sum())
            outputs.append(torch.cat(heads))
        rows.append(torch.stack(outputs))
    return mixer.projections.o_proj(torch.stack(rows))


@pytest.mark.parametrize(
    ("window", "sinks", "feature_map"),
    [
        (3, 0, "hedgehog"),
        (3, 2, "hedgehog"),
        (3, 0, "elu1"),
        (1, 1, "elu1"),
        (6, 4, "hedgehog"),
        (3, 2, "none"),
        (2, 0, "none"),
    ],
)
def test_softmax_in_the_window_and_features_behind_it(window: int, sinks: int, feature_map: str) -> None:
    agree(made(Sliding, window=window, sinks=sinks, feature_map=feature_map, rotary=False), sliding)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_up_to_its_window_it_is_the_teachers_attention(family: str) -> None:
    """Whatever a family does to its scores, such as Gemma 2's cap; so do a window with sinks and an mLSTM's share."""
    teacher, ids = louder(tiny(family, initializer_range=0.2)), windows(2, 12)
    wanted = teacher(ids).logits
    for sinks in (0, 2):
        model = copy.deepcopy(teacher)
        mixer = Spec("iskd.mixers.sliding.Sliding", {"window": 12, "sinks": sinks, "chunk": 5})
        surgery.apply(model, Record(4), [Convert(layer, mixer) for layer in range(4)])
        assert_near(model(ids).logits, wanted)
        longer = windows(2, 24)
        assert (model(longer).logits - teacher(longer).logits)[:, 16:].abs().max() > 1e-4
    both = copy.deepcopy(teacher)
    surgery.apply(both, Record(4), [Convert(layer, Spec("iskd.mixers.mlstm.MLSTMWindow")) for layer in range(4)])
    for module in both.modules():
        if isinstance(module, MLSTMWindow):  # all of it the window's
            module.window_gate.fill_(100.0)
            module.gate = Open()
    assert_near(both(ids).logits, wanted)


class Open(nn.Module):
    """A gate that lets everything through."""

    def forward(self, mixed: Tensor, _stream: Tensor) -> Tensor:
        return mixed


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4)


@torch.no_grad()
def test_capped_scores_are_those_of_the_matrix() -> None:
    model = louder(tiny("gemma2", initializer_range=0.2))
    surgery.apply(model, Record(4), [Convert(0, mixer_spec(window=5, sinks=2))])
    stack = Stack(model)
    one: Any = stack.layers[0].get_submodule(f"{stack.family.attn}.mixer")
    assert one.softcap == model.config.attn_logit_softcapping
    x, options = 9 * torch.randn(1, 11, 48), {"positions": torch.arange(11)[None]}
    v = one.projections.v_proj(x).unflatten(-1, (one.kv_heads, -1)).repeat_interleave(one.heads // one.kv_heads, 2)
    mixed = torch.einsum("bhts,bshv->bthv", one.matrix(x, **options), v)
    torch.testing.assert_close(one.projections.out(mixed), one(x, **options), atol=1e-4, rtol=1e-4)
    one.softcap = None
    assert (one.projections.out(mixed) - one(x, **options)).abs().max() > 1e-3, "the cap is felt"


@torch.no_grad()
@pytest.mark.parametrize(("feature_map", "sinks"), [("hedgehog", 0), ("relu", 2), ("none", 2), ("none", 3)])
def test_a_window_knows_documents_padding_and_caches(feature_map: str, sinks: int) -> None:
    """Documents of 4, 9 and 3 tokens in a row, padding in front: as alone, whole or in pieces, and as the matrix."""
    model = tiny("llama")
    mixer = Spec("iskd.mixers.sliding.Sliding", {"window": 3, "sinks": sinks, "chunk": 5, "feature_map": feature_map})
    surgery.apply(model, Record(4), [Convert(layer, mixer, seed=layer) for layer in range(4)])
    lengths, ids = (4, 9, 3), windows(1, 16)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    alone = torch.cat([model(piece).logits for piece in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(model(ids, position_ids=positions).logits, alone, atol=2e-5, rtol=1e-4)
    # five tokens of padding in front, the last document read in pieces
    row, mask = F.pad(ids, (5, 0)), F.pad(torch.ones_like(ids), (5, 0))
    spots = F.pad(positions, (5, 0))
    past = model(row[:, :19], attention_mask=mask[:, :19], position_ids=spots[:, :19], use_cache=True).past_key_values
    for t in (19, 20):
        now = slice(t, t + 1)
        out = model(row[:, now], attention_mask=mask[:, : t + 1], position_ids=spots[:, now], past_key_values=past)
        torch.testing.assert_close(out.logits, alone[:, t - 5 : t - 4], atol=2e-5, rtol=1e-4)
    stack = Stack(model)
    one: Any = stack.layers[0].get_submodule(f"{stack.family.attn}.mixer")
    x, options = torch.randn(1, 21, 48, generator=torch.Generator().manual_seed(0)), {"mask": mask, "positions": spots}
    v = one.projections.v_proj(x).unflatten(-1, (3, 8)).repeat_interleave(2, dim=2)
    mixed = torch.einsum("bhts,bshv->bthv", one.matrix(x, **options), v)
    torch.testing.assert_close(one.projections.out(mixed), one(x, **options), atol=2e-5, rtol=1e-4)
    assert torch.allclose(one.matrix(x, **options).sum(-1)[:, :, 5:], torch.ones(()))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_without_a_linear_part_it_is_the_teacher_under_a_mask(family: str) -> None:
    """True positions, masks alone changed: the baseline that costs no training."""
    teacher, model, ids = tiny(family), tiny(family), windows(2, 24)
    surgery.apply(model, Record(4), [Convert(layer, mixer_spec(window=5, sinks=2)) for layer in range(4)])
    ago = torch.arange(24)[:, None] - torch.arange(24)
    visible = (ago >= 0) & ((ago < 5) | (torch.arange(24) < 2))
    wanted = teacher(ids, attention_mask=visible.expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-4)


def mixer_spec(**kwargs: Any) -> Spec:
    return Spec("iskd.mixers.sliding.Sliding", {"feature_map": "none", "chunk": 4, **kwargs})


@torch.no_grad()
def test_a_cache_holds_the_window_and_the_sinks_and_no_more() -> None:
    model = tiny("llama", context=64)
    surgery.apply(model, Record(4), [Convert(layer, mixer_spec(window=5, sinks=2)) for layer in range(4)])
    held = []
    for tokens in (4, 9, 40):
        cache = DynamicCache(config=model.config)
        model(input_ids=windows(1, tokens), past_key_values=cache, use_cache=True)
        held.append(cache_bytes(cache))
    # keys and values of 3 heads of 8, and a flag, of 5 + 2 tokens in 4 layers, float32
    assert held == [4 * 4 * 7 * (2 * 3 * 8 + 1)] * 3


def test_places_count_real_tokens_of_each_document() -> None:
    seen = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2, 2]])
    assert places(seen, segments).tolist() == [[-1, -1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0]]
    assert places(seen, segments, torch.tensor([3, 1])).tolist() == [[2, 2, 3, 4, 4, 0, 1], [1, 2, 0, 1, 0, 0, 0]]


@torch.no_grad()
def test_sinks_are_filled_token_by_token() -> None:
    """Pieces shorter than the sinks, in a row with padding on the left and one with it on the right."""
    mixer, x = fresh(Sliding, window=3, sinks=3, feature_map="relu"), randn(2, 9, 48, seed=0)
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = mixer(x, mask=mask, positions=positions)
    for lengths in ([1] * 9, [2, 2, 5], [4, 1, 4]):
        outputs, past = [], DynamicCache()
        for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False):
            now = slice(start, start + length)
            slot = CacheSlot(past, 0)
            outputs.append(mixer(x[:, now], mask=mask[:, : now.stop], positions=positions[:, now], cache=slot))
        found = torch.cat(outputs, dim=1)
        torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], atol=1e-9, rtol=1e-9)


def test_a_dropped_window_is_a_window_of_one_token() -> None:
    """In training alone, and never where a cache goes on from the pass."""
    mixer, x = made(Sliding, window=4, sinks=2, window_dropout=0.5), randn(1, 9, 48, seed=0)
    whole = mixer.eval()(x)
    mixer.window = 1
    dropped = mixer(x)
    mixer.window = 4
    torch.manual_seed(0)
    mixer.train()
    passes = [mixer(x) for _ in range(20)]
    assert {(torch.allclose(one, whole), torch.allclose(one, dropped)) for one in passes} == {
        (True, False),
        (False, True),
    }
    assert all(torch.allclose(mixer(x, cache=CacheSlot(DynamicCache(), 0)), whole) for _ in range(8))
    assert any(isinstance(module, nn.Dropout) and module.p for module in mixer.modules())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"feature_map": "identity"}, "mixer.feature_map='identity': choose one of hedgehog, elu1, relu, none"),
        ({"gamma": 1.0}, r"mixer.gamma must be in \(0, 1\)"),
        ({"sinks": 9, "window": 8}, r"mixer.sinks=9 is more than mixer.window=8: .* set mixer.sinks to 8 or less"),
        ({"sinks": -1}, "mixer.sinks must be a whole number from 0"),
        ({"sinks": 1.5}, "mixer.sinks must be a whole number from 0"),
        ({"window_dropout": 1.0}, r"mixer.window_dropout must be in \[0, 1\)"),
        ({"window_dropout": 0.1, "feature_map": "none"}, "mixer.feature_map=none sees nothing there"),
        ({"gamma": 0.5, "feature_map": "none"}, "mixer.feature_map=none sees nothing there"),
    ],
)
def test_a_window_that_cannot_be_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(Sliding, **kwargs)


# ---- a window inside the mLSTM ---------------------------------------------------------------------------------------


def both(mixer: Any, x: Tensor) -> Tensor:
    """The mLSTM's own output before its gate, and softmax over window and sinks, mixed by head."""
    q, k, v = (projected(mixer, name, x) for name in "qkv")
    i, f = (15 * torch.tanh(gate(x) / 15) for gate in (mixer.input_gate, mixer.forget_gate))
    share, outputs = torch.sigmoid(mixer.window_gate), []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for h in range(6):
                past = torch.arange(t + 1)
                decay = torch.stack([F.logsigmoid(f[b, s + 1 : t + 1, h]).sum() for s in past])
                weights = torch.exp(decay + i[b, : t + 1, h]) * (k[b, : t + 1, h] @ q[b, t, h]) / 8**0.5
                o = weights @ v[b, : t + 1, h] / weights.sum().abs().clamp_min(1)
                o = o - o.mean()
                o = o / (o.square().mean() + mixer.norm.eps).sqrt() * mixer.norm.weight[h]
                near = [s for s in range(t + 1) if s > t - mixer.window or s < mixer.sinks]
                soft = torch.softmax(k[b, near, h] @ q[b, t, h] / 8**0.5, 0) @ v[b, near, h]
                outputs.append(share[h] * soft + (1 - share[h]) * o)
    mixed = torch.stack(outputs).view(*x.shape[:2], 6, 8)
    return mixer.projections.o_proj((mixed * torch.sigmoid(mixer.gate.proj(x)).unflatten(-1, (6, 8))).flatten(2))


def test_an_mlstm_with_a_window_inside_is_both() -> None:
    agree(made(MLSTMWindow, "gpt2", window=3, sinks=2), both)


@torch.no_grad()
def test_its_window_alone_is_the_teacher_under_a_mask() -> None:
    """With all of the mix and an open gate; queries and keys have their positions, those of the mLSTM none."""
    teacher, model, ids = tiny("llama"), tiny("llama"), windows(2, 24)
    mixer = Spec("iskd.mixers.mlstm.MLSTMWindow", {"window": 5, "sinks": 2, "chunk": 4})
    surgery.apply(model, Record(4), [Convert(layer, mixer) for layer in range(4)])
    for name, parameter in model.named_parameters():
        if "window_gate" in name or "gate.proj.bias" in name:
            parameter.fill_(60.0)
    ago = torch.arange(24)[:, None] - torch.arange(24)
    visible = (ago >= 0) & ((ago < 5) | (torch.arange(24) < 2))
    wanted = teacher(ids, attention_mask=visible.expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-4)

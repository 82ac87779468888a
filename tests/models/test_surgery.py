"""Laws of surgery: an edit changes what it names and nothing else, and the config says what the stack is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from iskd.models import surgery
from iskd.models.hosting import HostedBlock, HostedMixer
from iskd.models.stack import Stack
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec
from tests.factories import FAMILIES, block_specs, digest, mixer_specs, tiny, windows

IDENTITY = Spec("iskd.blocks.identity.Identity")
BOTTLENECK = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 3, "zero_up": False})
SPECS = block_specs()
MIXER = mixer_specs()["linear_attention"]


def edited(model: PreTrainedModel, *edits: Edit) -> PreTrainedModel:
    student = copy.deepcopy(model)
    surgery.apply(student, Record(len(Stack(model).layers)), edits)
    return student


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(windows()).logits


def slots(model: PreTrainedModel) -> list[set[Any]]:
    """Cache slots that each block of the stack uses; inner layers of a hosted block have none."""
    blocks = Stack(model).layers
    return [
        {block.layer_idx}
        if isinstance(block, HostedBlock)
        else {module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")}
        for block in blocks
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_named_layers_change(family: str) -> None:
    teacher = tiny(family)
    student = copy.deepcopy(teacher)
    before = list(Stack(student).layers)
    outside = {name: p for name, p in student.named_parameters() if f".{Stack(student).family.layers}." not in name}
    kept = {id(p): p.detach().clone() for p in student.parameters()}
    untouched = digest(teacher)
    record = surgery.apply(student, Record(4), [Replace(1, BOTTLENECK), Remove(2), Replace(0, SPECS["slim"])])
    after = list(Stack(student).layers)
    assert record.layers == (0, 1, 3)
    assert after[2] is before[3]
    assert isinstance(after[1], HostedBlock)
    assert type(after[0]) is type(before[0])
    new = {id(p) for block in after[:2] for p in block.parameters()}
    old = {id(p) for block in before for p in block.parameters()}
    assert not new & old
    names = dict(student.named_parameters())
    assert outside
    assert all(names[name] is p for name, p in outside.items())
    assert all(torch.equal(kept[id(p)], p) for p in student.parameters() if id(p) in kept)
    assert digest(teacher) == untouched
    assert teacher.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_by_the_identity_gives_exactly_what_removal_gives(family: str) -> None:
    teacher = tiny(family)
    replaced, removed = (
        edited(teacher, Replace(0, IDENTITY), Replace(2, IDENTITY)),
        edited(teacher, Remove(2), Remove(0)),
    )
    assert torch.equal(logits(replaced), logits(removed))
    assert not torch.equal(logits(replaced), logits(teacher))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_cache_slots_are_true_after_every_edit(family: str) -> None:
    student = edited(tiny(family, layers=6), Remove(1), Replace(3, BOTTLENECK), Remove(0), Replace(4, SPECS["slim"]))
    assert student.config.num_hidden_layers == len(Stack(student).layers) == 4
    assert slots(student) == [{0}, {1}, {2}, {3}]
    types = getattr(student.config, "layer_types", None)
    assert types is None or len(types) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_layer_takes_the_slot_of_its_place(family: str) -> None:
    teacher = tiny(family, layers=6)
    student = edited(teacher, Convert(4, MIXER), Remove(1), Convert(2, MIXER), Replace(5, BOTTLENECK), Remove(0))
    assert slots(student) == [{0}, {1}, {2}, {3}]
    stack = Stack(student)
    found = [isinstance(block.get_submodule(stack.family.attn), HostedMixer) for block in list(stack.layers)[:3]]
    assert found == [True, False, True]
    assert surgery.parameters(edited(teacher, Convert(3, MIXER))) == surgery.parameters(teacher)


@pytest.mark.parametrize("second", [BOTTLENECK, IDENTITY])
def test_a_converted_layer_can_be_replaced(second: Spec) -> None:
    both, alone = (
        edited(tiny("llama"), Convert(2, MIXER), Replace(2, second)),
        edited(tiny("llama"), Replace(2, second)),
    )
    assert torch.equal(logits(both), logits(alone))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_every_layer_keeps_its_own_attention_type(family: str) -> None:
    teacher = tiny(family, layers=5, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    expected = ["full_attention"] * 2 + ["sliding_attention"] * 3
    assert teacher.config.layer_types == expected
    student = edited(teacher, Remove(3), Remove(0), Replace(2, BOTTLENECK))
    assert student.config.layer_types == [expected[layer] for layer in (1, 2, 4)]
    assert teacher.config.layer_types == expected
    # the model routes masks by that list: a removed layer must not hand its type on
    removed, identity = edited(teacher, Remove(0)), edited(teacher, Replace(0, IDENTITY))
    assert torch.equal(logits(removed), logits(identity))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Remove(9)], "remove 9: the teacher has layers"),
        ([Remove(1), Remove(1)], "removed by an earlier edit"),
        ([Remove(1), Convert(2, IDENTITY)], "convert 2: iskd.blocks.identity.Identity is no mixer"),
        ([Convert(0, MIXER), Convert(1, Spec(MIXER.target, {"feature_map": "none"}))], "mixer.feature_map='none'"),
        ([Replace(1, BOTTLENECK), Convert(1, MIXER)], "convert 1: a compact block without an attention"),
        ([Convert(1, MIXER), Convert(1, MIXER)], "convert 1: its mixer was converted by an earlier edit"),
        ([Remove(1), Replace(2, Spec("os.path"))], "allow-list"),
        ([Replace(0, IDENTITY), Replace(2, Spec("iskd.blocks.slim.Slim", {"ratio": 2.0}))], "ratio must be in"),
    ],
)
def test_an_edit_that_cannot_be_applied_changes_nothing(edits: list[Edit], message: str) -> None:
    model = tiny("llama")
    before, untouched = list(Stack(model).layers), digest(model)
    with pytest.raises(ValueError, match=message):
        surgery.apply(model, Record(4), edits)
    assert [id(block) for block in Stack(model).layers] == [id(block) for block in before]
    assert digest(model) == untouched
    assert model.config.num_hidden_layers == 4


def test_a_record_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has 4 blocks but its record says 5"):
        surgery.apply(tiny("llama"), Record(5), [Remove(1)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPECS)
def test_a_record_rebuilds_the_same_structure(family: str, name: str) -> None:
    teacher = tiny(family)
    record = Record(4).extended([Replace(0, SPECS[name], seed=3), Remove(1), Replace(3, SPECS[name])])
    student = copy.deepcopy(teacher)
    assert surgery.apply(student, Record(4), record.edits) == record
    shapes = {key: value.shape for key, value in student.state_dict().items()}
    rebuilt = surgery.rebuild(teacher, record)
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == shapes
    rebuilt.load_state_dict(student.state_dict())
    assert torch.equal(logits(rebuilt.eval()), logits(student))
    meta = surgery.rebuild(teacher, record, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {key: value.shape for key, value in meta.state_dict().items()} == shapes
    assert surgery.parameters(meta) == surgery.parameters(student) < surgery.parameters(teacher)
    assert surgery.block_parameters(meta) == surgery.block_parameters(student)
    assert len(Stack(teacher).layers) == 4


PAPER: dict[str, Any] = {"norm": False, "zero_up": False}
PHI1 = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "intermediate_size": 8192}


@pytest.mark.parametrize(
    ("family", "config", "kwargs", "block", "after"),
    [
        ("gpt2", {}, {"reduction": 6, "layers": 2, "heads": 2}, 725_376, (6, 86_264_832)),
        ("phi", PHI1, {"reduction": 4, "layers": 4, "heads": 1}, 14_706_176, (12, 990_494_720)),
    ],
)
def test_published_parameter_counts(
    family: str, config: dict[str, int], kwargs: dict[str, int], block: int, after: tuple[int, int]
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    spec = Spec("iskd.blocks.bottleneck.Bottleneck", {**kwargs, **PAPER})
    surgery.apply(model, Record(len(Stack(model).layers)), [Replace(layer, spec) for layer in range(after[0])])
    assert sum(p.numel() for p in Stack(model).layers[0].parameters()) == block
    assert surgery.parameters(model) == after[1]


def test_fresh_weights_depend_on_the_seed_of_the_edit_alone() -> None:
    teacher = tiny("llama")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = edited(teacher, Replace(1, BOTTLENECK, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    # neither the global generator nor the edits before it matter
    same = edited(teacher, Replace(0, BOTTLENECK, seed=9), Replace(1, BOTTLENECK, seed=5))
    other = edited(teacher, Replace(1, BOTTLENECK, seed=6))

    def weights(model: PreTrainedModel) -> str:
        return digest(Stack(model).layers[1])

    assert weights(one) == weights(same) != weights(other)


@pytest.mark.parametrize("training", [True, False])
def test_a_new_block_takes_dtype_and_mode_of_the_old(training: bool) -> None:
    model = tiny("llama").bfloat16().train(training)
    surgery.apply(model, Record(4), [Replace(1, BOTTLENECK), Replace(2, SPECS["slim"])])
    for block in Stack(model).layers:
        assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
        assert {module.training for module in block.modules()} == {training}


def test_tied_weights_stay_tied_and_count_once() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    surgery.apply(model, Record(4), [Remove(1), Replace(2, BOTTLENECK)])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    outside = 101 * 48 + 48
    assert surgery.parameters(model) == surgery.block_parameters(model) + outside


def test_counts_are_those_of_the_stack() -> None:
    model = tiny("gpt2")
    assert surgery.block_parameters(model) == sum(p.numel() for p in Stack(model).layers.parameters())
    assert surgery.parameters(model) == sum(p.numel() for p in nn.Module.parameters(model))

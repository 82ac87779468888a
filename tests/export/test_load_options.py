"""Laws of students that need iskd: loaders' options taken or refused; copied, pickled, grown."""

from __future__ import annotations

import copy
import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import iskd
from iskd.export import IskdForCausalLM
from iskd.export.student import write
from iskd.models import surgery
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec
from tests.factories import mixer_specs, tiny, windows

EDITS: list[Edit] = [
    Replace(0, Spec("iskd.blocks.linear.Linear", {})),
    Convert(1, Spec("iskd.mixers.linear_attention.LinearAttention", {})),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("students") / "model"
    model = tiny("llama", layers=3)
    config = copy.deepcopy(model.config)
    record = surgery.apply(model, Record(3), EDITS)
    before = os.umask(0o022)
    assert not write(target, model, record, config)
    os.umask(before)
    return target


TAKEN: list[dict[str, Any]] = [
    {"subfolder": "", "use_safetensors": True, "low_cpu_mem_usage": True, "use_cache": False, "token": "x"},
    {"device_map": "auto", "dtype": "float32"},
    {"device_map": {"": "cpu"}, "torch_dtype": "auto", "force_download": False, "cache_dir": "x"},
    {"dtype": torch.bfloat16, "attn_implementation": "eager", "revision": "main", "local_files_only": True},
    {"torch_dtype": "float16", "load_in_8bit": False, "quantization_config": None},
    {"use_auth_token": False, "use_kernels": False, "_fast_init": True, "disable_mmap": False, "key_mapping": {}},
    {"key_mapping": None, "max_memory": {}, "use_flash_attention_2": False},
]
REFUSED: list[dict[str, Any]] = [
    {"subfolder": "inner"},
    {"use_safetensors": False},
    {"load_in_4bit": True},
    {"quantization_config": {"load_in_8bit": True}},
    {"device_map": {"a": "cpu", "b": "cuda:0"}},
    {"dtype": "int8"},
    {"dtype": torch.int8},
    {"device_map": "cuda:99"},
    {"max_memory": {"cpu": "1GB"}},
    {"attn_implementation": "nope"},
    {"key_mapping": {"a": "b"}},
    {"use_kernels": True},
]


@pytest.mark.parametrize("options", TAKEN)
def test_options_that_loaders_always_pass_are_taken(options: dict[str, Any], folder: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, report = loaded
    assert not any(report.values())
    asked = str(options.get("dtype", options.get("torch_dtype"))).removeprefix("torch.")
    assert model.dtype == {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(asked, torch.float32)


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        IskdForCausalLM.from_pretrained(folder, **options)


def test_what_an_auto_class_puts_into_a_config_is_heard(folder: Path) -> None:
    """`AutoModelForCausalLM` with remote code makes a config of options, and hands on that."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    options: dict[str, Any] = {"attn_implementation": "eager", "use_cache": False, "output_hidden_states": True}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    assert plain.config._attn_implementation != "eager"
    assert model.config._attn_implementation == "eager"
    assert (model.config.use_cache, model.config.output_hidden_states) == (False, True)
    assert plain.config.use_cache
    with pytest.raises(ValueError, match="nope"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="nope")
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="not from_config"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    config.teacher = {**config.teacher, "hidden_size": 8}
    with pytest.raises(ValueError, match=r"config=\{'teacher'.*in model\.config"):
        IskdForCausalLM.from_pretrained(folder, config=config)


@pytest.mark.parametrize("said", [True, False])
def test_a_head_of_another_kind_is_saved_as_it_is(said: bool, folder: Path, tmp_path: Path) -> None:
    """Whatever the config says of it; a student that needs iskd, and a removal alone, that an export writes."""
    ids = torch.arange(6).view(1, -1)
    for native in (False, True):
        for tied in (False, True):
            target = tmp_path / f"{native}{tied}"
            model: Any = tiny("llama", layers=3) if native else iskd.load(folder)
            own = model.get_input_embeddings().weight
            model.lm_head.weight = own if tied else torch.nn.Parameter(own.detach().clone() * 2)
            model.config.tie_word_embeddings = said
            if native:
                assert write(target, model, surgery.apply(model, Record(3), [Remove(1)]), model.config)
            else:
                model.save_pretrained(target)
            again: Any = AutoModelForCausalLM.from_pretrained(target)
            assert again.config.tie_word_embeddings == tied
            assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
            assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_options_of_saving_are_heard_or_refused(folder: Path, tmp_path: Path) -> None:
    model: Any = iskd.load(folder)
    elsewhere = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=elsewhere, safe_serialization=True)
    assert all(bool((value == 0.5).all()) for value in iskd.load(tmp_path / "given").parameters())
    assert not all(bool((value == 0.5).all()) for value in model.parameters())
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    for option in ({"push_to_hub": True}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            model.save_pretrained(tmp_path / "other", **option)
    with pytest.raises(ValueError, match="is missing"):
        model.save_pretrained(tmp_path / "other", state_dict={})


def test_a_student_is_copied_pickled_and_grown(folder: Path, tmp_path: Path) -> None:
    model: Any = iskd.load(folder)
    with torch.no_grad():
        said = model(windows()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert torch.equal(other(windows()).logits, said)
    (tmp_path / "pickle").write_bytes(pickle.dumps(model))
    code = "import pickle; pickle.load(open('pickle', 'rb')).save_pretrained('.')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ})
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 8)
    model.save_pretrained(tmp_path / "grown")
    again: Any = iskd.load(tmp_path / "grown")
    with torch.no_grad():
        assert torch.equal(iskd.load(tmp_path)(windows()).logits, said)
        assert again(windows()).logits.shape[-1] == rows + 8
        assert torch.equal(again(windows()).logits, model(windows()).logits)


def test_every_mixer_is_pickled() -> None:
    """With every activation: a mixer holds functions that have a name."""
    for name, spec in mixer_specs().items():
        options: dict[str, Any] = {key: "identity" for key in ("activation", "conv_activation") if key in spec.kwargs}
        for kwargs in (spec.kwargs, {**spec.kwargs, **options}) if options else (spec.kwargs,):
            model: Any = tiny("llama", layers=1)
            surgery.apply(model, Record(1), [Convert(0, Spec(spec.target, kwargs))])
            with torch.no_grad():
                again = pickle.loads(pickle.dumps(model))(windows()).logits
                assert torch.equal(again, model(windows()).logits), name


def test_files_can_be_read_as_the_umask_says(folder: Path) -> None:
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in folder.iterdir()} == {"0o644"}


def test_a_config_tells_its_sizes_and_blocks_have_one_attention(folder: Path, tmp_path: Path) -> None:
    """What readers of configs ask for; and compact blocks, which hold configs of their own, compute as asked."""
    config = AutoConfig.from_pretrained(folder)
    sizes = (config.vocab_size, config.num_hidden_layers, config.max_position_embeddings, config.hidden_size)
    known = tiny("llama", layers=3).config
    assert sizes == (known.vocab_size, 3, known.max_position_embeddings, known.hidden_size)
    assert not hasattr(config, "rope_theta_of_nobody")
    assert not hasattr(type(config)(), "vocab_size"), "without a teacher there is nothing to tell"
    assert "vocab_size" not in json.loads((folder / "config.json").read_text()), "said once, in the teacher's"
    model = tiny("llama", layers=4)
    record = surgery.apply(
        model, Record(4), [Remove(1), Replace(2, Spec("iskd.blocks.slim.Slim", {"kv_groups": 1, "channels": 8}))]
    )
    write(tmp_path, model, record, tiny("llama", layers=4).config)
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 3
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for asked in ("eager", "sdpa"):
        loaded.set_attn_implementation(asked)
        attentions = [module for module in loaded.modules() if type(module).__name__ == "LlamaAttention"]
        assert [module.config._attn_implementation for module in attentions] == [asked] * 3
    assert len({id(module.config) for module in attentions}) == 2

"""Exports: what is written loads elsewhere with the same numbers, and what was tampered with does not load."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

import iskd
from iskd.export import loading
from iskd.export import student as student_module
from iskd.export.student import MAX_SHARD_BYTES, why_not_native, write
from iskd.export.write import export
from iskd.models import Stack, surgery
from iskd.models.families import dims_of
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec
from iskd.system.faults import RunError
from tests.factories import FAMILIES, NEWER, block_specs, mixer_specs, tiny, windows

SLIM = Spec("iskd.blocks.slim.Slim", {"ratio": 0.5})


def student(
    family: str, *edits: Edit, layers: int = 4, **config: Any
) -> tuple[PreTrainedModel, Record, PreTrainedModel]:
    teacher = tiny(family, layers=layers, **config)
    model = tiny(family, layers=layers, **config)
    return model, surgery.apply(model, Record(layers), edits), teacher


def saved(tmp_path: Path, family: str = "llama") -> tuple[Path, PreTrainedModel]:
    model, record, teacher = student(family, Replace(1, SLIM))
    write(tmp_path / "model", model, record, teacher.config)
    return tmp_path / "model", model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", sorted(block_specs()))
def test_every_block_in_every_family_reloads_exactly(family: str, block: str, tmp_path: Path) -> None:
    model, record, teacher = student(
        family, Replace(0, block_specs()[block], seed=3), Remove(2), Replace(3, block_specs()[block])
    )
    write(tmp_path, model, record, teacher.config)
    ids = windows()
    loaded = iskd.load(tmp_path)
    assert type(loaded).__bases__[1] is type(model), "a loaded student is the teacher's own class"
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_removals_alone_are_saved_as_the_teachers_own_architecture(family: str, tmp_path: Path) -> None:
    model, record, teacher = student(family, Remove(1), Remove(2))
    write(tmp_path, model, record, teacher.config)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == teacher.config.model_type
    ids = windows()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)


def slimmed(*layers: int, kv_groups: int = 2, channels: int = 64) -> list[Replace]:
    sizes = {"kv_groups": kv_groups, "channels": channels}
    return [Replace(layer, Spec("iskd.blocks.slim.Slim", sizes)) for layer in layers]


FULL, WINDOW = "full_attention", "sliding_attention"
WINDOWED = {"use_sliding_window": True, "sliding_window": 4}
# name: family, keys of its config, edits; what loads with plain transformers
NATIVE: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
    **{f"{name} removed": (name, {}, [Remove(0), Remove(2)]) for name in FAMILIES},
    **{
        f"{name} {kind}": (name, {**WINDOWED, **keys}, [Remove(0)])
        for name in ("qwen2", "qwen3")
        for kind, keys in (
            ("max_window_layers", {"max_window_layers": 2}),
            ("layer_types", {"layer_types": [FULL, WINDOW, FULL, WINDOW]}),
        )
    },
    **{
        f"{name} slim": (name, {}, [Remove(1), *slimmed(0, 2, 3)])
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", *NEWER)
    },
    "phi slim": ("phi", {}, slimmed(0, 1, 2, 3, kv_groups=4)),
    "phi norms": ("phi", {"qk_layernorm": True}, slimmed(0, 1, 2, 3, kv_groups=6)),
    "qwen3 window slim": ("qwen3", {**WINDOWED, "max_window_layers": 2}, [Remove(3), *slimmed(0, 1, 2)]),
    **{f"{name} channels": (name, {}, slimmed(0, 1, 2, 3, kv_groups=6)) for name in ("gpt2", "gpt_neox", "opt")},
}
SHARD = 40_000  # bytes: several files even of a tiny model
IN_A_PROCESS_WITHOUT_ISKD = """
import sys, torch
sys.modules["iskd"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
root, names = sys.argv[1], sys.argv[2].split(",")
ids, found = torch.load(f"{root}/ids.pt", weights_only=True), {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}").eval()
    assert AutoTokenizer.from_pretrained(f"{root}/{name}").eos_token_id is not None
    text = model.generate(ids[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    found[name] = (model(ids).logits.detach(), text, model.generation_config.no_repeat_ngram_size)
own = f"{root}/own"
assert AutoTokenizer.from_pretrained(own).eos_token_id is not None
for trust in (False, True):
    try:
        AutoModelForCausalLM.from_pretrained(own, trust_remote_code=trust)
    except (ImportError, ValueError) as error:
        found[f"refused {trust}"] = f"{type(error).__name__}: {error}"
del sys.modules["iskd"]
model = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True)
found["own"] = model(ids).logits.detach()
model.save_pretrained(f"{root}/again", max_shard_size=int(sys.argv[3]))
torch.save(found, f"{root}/out.pt")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, PreTrainedModel], dict[str, Any]]:
    """The folder of all `NATIVE` exports, the students, and what one process that cannot import iskd makes of them."""
    root, students = tmp_path_factory.mktemp("native"), {}
    for index, (name, (family, keys, edits)) in enumerate(NATIVE.items()):
        students[name], record, teacher = student(family, *edits, **keys)
        cast(Any, students[name]).generation_config.no_repeat_ngram_size = 3
        size = SHARD if index % 2 else MAX_SHARD_BYTES
        export(
            root / name, students[name], record, teacher.config, byte_tokenizer(), verify=False, max_shard_bytes=size
        )
    students["own"], record, teacher = student("llama", Remove(0), Replace(1, SLIM), Replace(2, SLIM), layers=4)
    export(root / "own", students["own"], record, teacher.config, byte_tokenizer(), verify=False, max_shard_bytes=SHARD)
    torch.save(windows(), root / "ids.pt")
    command = [sys.executable, "-c", IN_A_PROCESS_WITHOUT_ISKD, str(root), ",".join(NATIVE), str(SHARD)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    subprocess.run(
        command, check=True, timeout=500, env=environment, cwd=Path(__file__).parents[2], stdin=subprocess.DEVNULL
    )
    return root, students, torch.load(root / "out.pt", weights_only=True)


@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_native_export_loads_where_iskd_is_not(
    name: str, exported: tuple[Path, dict[str, PreTrainedModel], dict[str, Any]]
) -> None:
    """Equal logits and cached text; generation config and tokenizer come along."""
    _, students, found = exported
    model: Any = students[name]
    logits, text, ngram = found[name]
    torch.testing.assert_close(logits, model(windows()).logits, atol=1e-6, rtol=1e-5)
    assert torch.equal(text, model.generate(windows()[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert ngram == 3


def test_other_export_loads_where_iskd_was_not_imported(
    exported: tuple[Path, dict[str, PreTrainedModel], dict[str, Any]],
) -> None:
    """With trust_remote_code alone, from shards; without the package the message says what to install."""
    root, students, found = exported
    with torch.no_grad():
        expected = students["own"](windows()).logits
    assert torch.equal(found["own"], expected)
    assert found["refused False"].startswith("ValueError")
    assert "trust_remote_code" in found["refused False"]
    assert found["refused True"].startswith("ImportError")
    assert "in the package iskd" in found["refused True"]
    assert "pip install " in found["refused True"]
    for folder in (root / "own", root / "again"):
        files = {path.name for path in folder.iterdir()}
        assert {"model.safetensors.index.json", "modeling_iskd.py"} <= files
        assert "model.safetensors" not in files
        assert "export.py" not in files, "transformers copies the module of a class that it registered"
        assert torch.equal(iskd.load(folder)(windows()).logits, expected)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(windows()).logits, expected)


def test_shards_of_an_earlier_export_are_never_read(tmp_path: Path) -> None:
    """Neither beside a single file nor beside fewer shards; a shard that is gone is named."""
    edits: dict[str, tuple[Edit, ...]] = {"native": (Remove(1),), "own": (Replace(1, SLIM),)}
    for kind, size in ((kind, size) for kind in edits for size in (SHARD, 2 * SHARD, MAX_SHARD_BYTES, SHARD)):
        model, record, teacher = student("llama", *edits[kind])
        with torch.no_grad():
            cast(Any, model).get_input_embeddings().weight.mul_(1 + size / 1e12)
        write(tmp_path, model, record, teacher.config, max_shard_bytes=size)
        with torch.no_grad():
            assert torch.equal(iskd.load(tmp_path)(windows()).logits, model(windows()).logits)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ weight files: {last.name}"):
        iskd.load(tmp_path)


@pytest.mark.parametrize("name", NATIVE)
def test_native_config_states_depth_and_sizes_of_the_family(
    name: str, exported: tuple[Path, dict[str, PreTrainedModel], dict[str, Any]]
) -> None:
    family, keys, edits = NATIVE[name]
    values = json.loads((exported[0] / name / "config.json").read_text())
    assert values["model_type"] == family
    assert "Iskd" not in values["architectures"][0]
    left = 4 - sum(isinstance(edit, Remove) for edit in edits)
    config = AutoConfig.for_model(**values)
    assert config.num_hidden_layers == left
    assert len(Stack(iskd.load(exported[0] / name)).layers) == left
    if keys.get("max_window_layers"):
        assert config.max_window_layers == (1 if Remove(0) in edits else 2)
        derived = AutoConfig.for_model(**{key: value for key, value in values.items() if key != "layer_types"})
        assert derived.layer_types == config.layer_types, "both ways of saying it agree"
        assert config.layer_types == ([FULL, WINDOW, WINDOW] if Remove(0) in edits else [FULL, FULL, WINDOW])
    elif keys.get("layer_types"):
        assert config.layer_types == [WINDOW, FULL, WINDOW]
    if "slim" in name:
        assert (config.num_attention_heads, config.intermediate_size) == (4, 64)
        assert values["head_dim"] == dims_of(tiny(family, **keys).config).head_dim


def test_every_list_of_one_value_per_layer_is_cut(tmp_path: Path) -> None:
    """Whether transformers knows such a key for this family or not; lists that mean something else stay."""
    keys = {"no_rope_layers": [1, 0, 1, 1], "layer_rope_theta": [1.0, 2.0, 3.0, 4.0], "other": [5, 6, 7, 8]}
    model, record, teacher = student("llama", Remove(1), Remove(2), **keys)
    write(tmp_path, model, record, teacher.config)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["no_rope_layers"] == [1, 1]
    assert values["layer_rope_theta"] == [1.0, 4.0]
    assert values["other"] == [5, 6, 7, 8]
    assert teacher.config.no_rope_layers == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("family", "keys", "edits", "why"),
    [
        ("llama", {}, [*slimmed(0, 1, 2), *slimmed(3, channels=48)], "different sizes, 2 kinds"),
        ("llama", {}, [*slimmed(0, 1, 2), *slimmed(3, kv_groups=1)], "different sizes"),
        ("llama", {}, slimmed(0, 1, 2), "different sizes"),
        ("llama", {}, [Replace(1, Spec("iskd.blocks.linear.Linear", {}))], "compact blocks or mixers"),
        ("llama", {"heads": 8, "kv_heads": 8}, slimmed(0, 1, 2, 3, kv_groups=5), "llama cannot say 5 heads of width 6"),
        ("gpt2", {}, slimmed(0, 1, 2, 3, kv_groups=4), "gpt2 cannot say 4 heads .*block.kv_groups=6"),
        ("gpt_neox", {}, slimmed(0, 1, 2, 3, kv_groups=4), "gpt_neox cannot say 4 heads"),
        ("opt", {}, slimmed(0, 1, 2, 3, kv_groups=4), "opt cannot say 4 heads"),
        ("phi", {"qk_layernorm": True}, slimmed(0, 1, 2, 3, kv_groups=4), "phi cannot say 4 heads"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [Remove(1)], "depends on a layer's number"),
    ],
)
@torch.no_grad()
def test_what_no_config_of_the_family_says_is_left_to_iskd(
    family: str, keys: dict[str, Any], edits: list[Any], why: str, tmp_path: Path
) -> None:
    """Sizes that differ, heads that do not divide the width, attention scaled by the layer's number."""
    model, record, teacher = student(family, *edits, **keys)
    assert not write(tmp_path, model, record, teacher.config)
    assert re.search(why, why_not_native(model))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "iskd"
    assert torch.equal(iskd.load(tmp_path)(windows()).logits, model(windows()).logits)


def test_stock_llama_still_refuses_sizes_that_differ_from_layer_to_layer() -> None:
    """When this stops raising, students of mixed sizes can be exported natively: extend `native_config`."""
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError, match="'intermediate_size' is a per-layer attribute"):
        tiny("llama", per_layer_config={1: {"intermediate_size": 48}})


@pytest.mark.parametrize("family", ["gpt2", "phi", "qwen3"])
@torch.no_grad()
def test_students_with_removed_compact_and_converted_layers_load(family: str, tmp_path: Path) -> None:
    blocks, mixers = block_specs(), list(mixer_specs().values())
    slim = Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})
    foreign = [block for block in blocks.values() if block.target != slim.target]
    for index, mixer in enumerate(mixers):
        model, record, teacher = student(
            family,
            Convert(0, mixer, seed=1),
            Replace(1, foreign[index % len(foreign)], seed=2),
            Remove(2),
            Replace(3, slim, seed=3),
            Convert(3, mixer, seed=4),
            layers=6,
        )
        assert not write(tmp_path / str(index), model, record, teacher.config)
        loaded: Any = iskd.load(tmp_path / str(index))
        assert loaded.iskd_record == record
        assert torch.equal(loaded(windows()).logits, model(windows()).logits)
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(loaded.generate(windows(), **options), cast(Any, model).generate(windows(), **options))


def test_export_is_reopened_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, record, teacher = student("llama", Replace(1, SLIM))
    target = export(tmp_path / "model", model, record, teacher.config, dtype=torch.bfloat16)
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md",
        "config.json",
        "export.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_iskd.py",
        "record.json",
    ]
    text = "".join(path.read_text() for path in (*target.glob("*.json"), target / "README.md"))
    assert str(Path.home()) not in text
    assert "_name_or_path" not in text
    before = (target / "model.safetensors").read_bytes()
    original = student_module.model_tensors
    monkeypatch.setattr(student_module, "model_tensors", lambda m: {k: v + 0.1 for k, v in original(m).items()})
    with pytest.raises(RunError, match=r"other logits.*resume=DIR"):
        export(target, model, record, teacher.config)
    assert (target / "model.safetensors").read_bytes() == before, "a failed export leaves the earlier one"


def test_saving_a_loaded_student_keeps_its_record(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    loaded = iskd.load(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(windows()).logits, model(windows()).logits)


def test_record_outside_the_allow_list_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    data = json.loads((folder / "config.json").read_text())
    data["record"]["edits"][0]["block"]["target"] = "os.system"
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"'os\.system', which is outside the allow-list"):
        iskd.load(folder)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "truncated", "gone"])
def test_weights_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "down_proj" in key)
    if damage == "missing":
        tensors.pop(name)
    elif damage == "unknown":
        tensors["extra"] = torch.zeros(2)
    elif damage == "shape":
        tensors[name] = tensors[name][:, :2].contiguous()
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "gone":
        file.unlink()
    else:
        save_file(tensors, file)
    size = file.stat().st_size if file.exists() else 0
    cut = (
        rf"model\.safetensors cannot be read: it is cut short, {size:,} bytes where its header describes {size + 100:,}"
    )
    message = {"shape": "has shape", "truncated": cut, "gone": "is missing beside it"}.get(damage, f"is {damage}")
    with pytest.raises(ValueError, match=message):
        iskd.load(folder)


def test_native_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    model, record, teacher = student("llama", Remove(1))
    write(tmp_path, model, record, teacher.config)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' is missing \(1 such\)"):
        iskd.load(tmp_path)


def test_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a model directory: config\.json is missing"):
        iskd.load(tmp_path)


def test_a_student_on_the_hub_is_fetched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = saved(tmp_path)
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    loaded = loading.IskdForCausalLM.from_pretrained("owner/student", revision="v1", local_files_only=True)
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("owner/student", "v1", True)
    with torch.no_grad():
        assert torch.equal(loaded(windows()).logits, model(windows()).logits)

"""A model's folder as people have it, checked before a weight is read: what it is, what it lacks, what to do about it.

Only config.json and the headers of the weight files are read. Each finding is a sentence with the file and the fix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from iskd.models.families import FAMILIES, why_never
from iskd.models.skeletons import check_numbers, read_generation_config, refuse_kernels
from iskd.models.weights import INDEX, WEIGHTS, check_whole, refuse_pointer, weight_files
from iskd.system import Json, read_json

CONFIG, ADAPTER = "config.json", "adapter_config.json"
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MAX_LAYERS = 10_000
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
# Files by which the methods of quantisation say what they did, beside or instead of config.json.
_QUANTISED_BY = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_STORED = ("F64", "F32", "F16", "BF16")
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
_CONTAINERS = {
    ".gguf": "a GGUF file, made for llama.cpp",
    ".ggml": "a GGML file, made for llama.cpp",
    ".onnx": "an ONNX graph",
    ".h5": "TensorFlow weights",
    ".keras": "Keras weights",
    ".msgpack": "Flax weights",
    ".nemo": "a NeMo archive",
    ".tflite": "a TFLite graph",
    ".npz": "NumPy weights",
    ".mlmodel": "a Core ML model",
    ".zip": "an archive",
    ".tar": "an archive",
    ".gz": "an archive",
}
_CONVERT = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"


def check_model_folder(folder: Path, *, code: bool = False) -> Json:
    """Check that a folder holds a decoder of a known family in safetensors that are whole and fit its config.

    With `code` its class may come from the folder itself, whatever the family.

    Returns:
        The content of config.json.

    Raises:
        ValueError: what is wrong, by file, and what to do.
    """
    config = read_model_config(folder, code=code)
    weights = _weights_of(folder)
    if config["model_type"] == "iskd":
        raise ValueError(f"{folder / CONFIG} is that of a student that needs iskd: open it with iskd.load")
    stored: dict[str, tuple[Path, str]] = {}
    for file in weights:
        check_whole(file)
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                stored[name] = file, opened.get_slice(name).get_dtype()
    _check_index(folder, stored)
    _check_stored(folder, stored)
    _check_depth(folder / CONFIG, config, stored)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt"):
        refuse_pointer(folder / name)
    read_generation_config(folder)
    return config


def read_model_config(folder: Path, *, code: bool = False) -> Json:
    """The content of config.json, of a model that can be compressed as far as it says.

    Raises:
        ValueError: there is no such file, or it is about something else: a family that is not known, quantised weights,
            an adapter, lists that are not as long as the model is deep.
    """
    if not folder.is_dir():
        raise ValueError(_no_folder(folder))
    file = folder / CONFIG
    refuse_pointer(folder / ADAPTER)
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder / ADAPTER} says that {folder} holds an adapter, which loads another model: merge it "
            "first (peft: model.merge_and_unload().save_pretrained(NEW_DIR)), or remove the file to use the model alone"
        )
    if not file.is_file():
        raise ValueError(_no_config(folder))
    refuse_pointer(file)
    config = read_json(file, links=True)
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold an object, got {type(config).__name__}: copy the model's own config.json")
    check_model_config(config, file, code=code)
    for name, method in _QUANTISED_BY.items():
        if (folder / name).is_file():
            raise ValueError(_quantised(folder / name, method))
    return config


def check_model_config(config: Mapping[str, Any], file: Path, *, code: bool = False) -> None:
    """Check what a config says alone: family, quantisation, depth, lists by layer. Raises ValueError with the fix."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"{file} has no model_type: copy the config.json that came with the weights")
    families = ", ".join(sorted(FAMILIES))
    if reason := why_never(config):
        raise ValueError(f"{file}: model_type {kind!r:.80} {reason}; dense ones of {families} work")
    if kind not in (*FAMILIES, "iskd") and not (code and "auto_map" in config):
        hint = " (code beside the weights runs only with trust_remote_code=true)" if "auto_map" in config else ""
        what = f"is none that is supported: choose a model of {families}, or add a Family(...) to"
        raise ValueError(f"{file}: model_type {kind!r:.80} {what} iskd/models/families.py{hint}")
    for key in ("quantization_config", "compression_config"):
        if (found := config.get(key)) is not None:
            method = found.get("quant_method", key) if isinstance(found, dict) else key
            raise ValueError(_quantised(file, str(method)[:40]))
    refuse_kernels(config, str(file))
    check_numbers(config, file)
    refuse_other_class(config, file)
    depths = {key: config[key] for key in _DEPTHS if config.get(key) is not None}
    for key, depth in depths.items():
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= _MAX_LAYERS:
            raise ValueError(f"{file}: {key} must be an integer in 1..{_MAX_LAYERS}, got {depth!r:.80}")
    if len(set(depths.values())) > 1:
        raise ValueError(f"{file} gives two depths, {depths}: keep the one that is true")
    for key, values in config.items():
        if key.endswith("layer_types") and isinstance(values, list) and {len(values)} != set(depths.values()) != set():
            said = " and ".join(f"{name} is {depth}" for name, depth in depths.items())
            raise ValueError(f"{file}: {key} lists {len(values)} layers, {said}: make the two agree")


def refuse_other_class(config: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError where `architectures` names another family's class: weights may fit both, numbers would not."""
    own, named = config["model_type"], config.get("architectures")
    if own not in FAMILIES or not isinstance(named, list):
        return
    for kind in FAMILIES.keys() - {own}:
        if (name := MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]) in named:
            raise ValueError(
                f"{file}: model_type is {own!r} and architectures names {name}, which is of {kind!r}: set model_type "
                "to the family that the weights are of"
            )


def check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Check what transformers tells of loading: every weight has its place and every place its weight.

    Args:
        folder: of the model.
        report: its `output_loading_info`, with `ignore_mismatched_sizes`.

    Raises:
        ValueError: weights are missing, of another shape, or left over.
    """
    mend = f"{CONFIG} and the safetensors do not belong together: take both from one model"
    if wrong := sorted(report.get("mismatched_keys") or ()):
        name, stored, wanted = wrong[0]
        raise ValueError(
            f"{folder}: {len(wrong)} weights have another shape than {CONFIG} says ({name} is {list(stored)}, expected "
            f"{list(wanted)}): {mend}"
        )
    if unset := sorted(report["missing_keys"]):
        if unset in (["lm_head.weight"], ["embed_out.weight"]):
            mend = f"set tie_word_embeddings to true in {CONFIG} if the head is the embedding"
        raise ValueError(f"{folder}: the weights lack {len(unset)} parameters of the model ({unset[0]}, ...): {mend}")
    if spare := sorted(name for name in report["unexpected_keys"] if not _DERIVED.search(name)):
        raise ValueError(
            f"{folder}: {len(spare)} weights have no place in the model of {CONFIG} ({spare[0]}, ...): {mend}"
        )


# Buffers that older versions of transformers saved and later ones compute.
_DERIVED = re.compile(
    r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$|position_ids$"
)


def _quantised(file: Path, method: str) -> str:
    return (
        f"{file} says that the weights are quantised ({method}); a teacher needs them in float32, bfloat16 or float16: "
        "take the checkpoint that it was made from, or dequantise it (model.dequantize().save_pretrained(NEW_DIR))"
    )


def _weights_of(folder: Path) -> list[Path]:
    """The weight files, each there and none a pointer."""
    refuse_pointer(folder / INDEX)
    files = weight_files(folder)
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:5])}, of {INDEX}: "
            "copy or download them again"
        )
    if not files:
        raise ValueError(f"{folder} has no weights: {WEIGHTS} is missing{_instead(folder)}")
    return files


def _instead(folder: Path) -> str:
    """What lies there in place of the weights, and what to do with it."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in names:
        refuse_pointer(folder / name)
    if other := [name for name in names if name.endswith(".safetensors")]:
        return f" ({other[0]} is there: rename it, or save the model again, if it is the whole model)"
    if pickles := [name for name in names if name.endswith(_PICKLES) and name != "training_args.bin"]:
        return (
            f" ({pickles[0]} is a pickle and never loaded, as it can run code: if you trust it, save the model as "
            f"safetensors: {_CONVERT})"
        )
    if told := _container(names):
        return f" ({told})"
    return ": copy it beside config.json"


def _container(names: Iterable[str]) -> str:
    for name in names:
        what = _CONTAINERS.get(Path(name).suffix.lower())
        if what is not None:
            return f"{name} is {what}, which is not read: take the model's safetensors, or convert it to them"
    return ""


def _no_folder(folder: Path) -> str:
    if not folder.exists():
        return f"model.path={folder} is not a directory: give the one that holds {CONFIG}"
    if folder.suffix == ".safetensors" or folder.name == CONFIG:
        return f"model.path={folder} is a file: give the folder that it lies in, {folder.parent}"
    told = _container([folder.name]) or (
        f"{folder.name} is a pickle and never loaded: save the model as safetensors" * folder.name.endswith(_PICKLES)
    )
    return f"model.path={folder} is a file and not a directory: give the one that holds {CONFIG}" + (
        f" ({told})" if told else ""
    )


def _no_config(folder: Path) -> str:
    said = f"{folder} is not a model directory: {CONFIG} is missing"
    if not any(folder.iterdir()):
        return f"{said}, the folder is empty: give the one that the model was saved or downloaded to"
    inner = sorted({path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/{CONFIG}")})
    if inner:
        more = f" (one of {len(inner)} such folders)" if len(inner) > 1 else ""
        return f"{said}, a folder in it has one: give {inner[0]}{more}"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if {"params.json"} & set(names):
        return f"{said}; params.json is of a format that is not read: take the model in the format of transformers"
    told = _container(names)
    return f"{said} ({told})" if told else f"{said}: copy the one that came with the weights"


def _check_index(folder: Path, stored: Mapping[str, tuple[Path, str]]) -> None:
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return
    if lost := sorted(read_json(folder / INDEX)["weight_map"].keys() - stored.keys()):
        raise ValueError(
            f"{folder / INDEX} names {len(lost)} tensors that no shard holds ({lost[0]}, ...): copy both again"
        )


def _check_stored(folder: Path, stored: Mapping[str, tuple[Path, str]]) -> None:
    if not stored:
        raise ValueError(f"{folder} has no weights: nothing is stored in {WEIGHTS}: copy it again")
    for name, (file, dtype) in stored.items():
        if dtype not in _STORED and not _DERIVED.search(name):
            raise ValueError(_quantised(file, f"{name} is {dtype}"))
        if ".lora_A." in name or ".lora_B." in name:
            raise ValueError(
                f"{file} holds an adapter ({name}): merge it first (peft: model.merge_and_unload()"
                ".save_pretrained(NEW_DIR))"
            )


def _check_depth(file: Path, config: Mapping[str, Any], stored: Mapping[str, tuple[Path, str]]) -> None:
    key = next((key for key in _DEPTHS if config.get(key) is not None), None)
    layers = {int(found[1]) for name in stored if (found := _LAYER.search(name))}
    if key is None or not layers or layers == set(range(config[key])):
        return
    depth = max(layers) + 1
    if gaps := sorted(set(range(depth)) - layers):
        raise ValueError(f"{file.parent}: the weights lack layer {gaps[0]} of {depth}: copy all of the model's files")
    raise ValueError(
        f"{file} says {key}={config[key]}, the weights hold {depth} layers: set {key} to {depth}, or take the weights "
        "that belong to it"
    )


def refuse_missing_folder(what: str, name: str) -> None:
    """Raise ValueError for a name that is a folder's by its form, but no folder: the hub would be asked in vain."""
    first, slash, _ = name.partition("/")
    inside = bool(slash) and Path(first).is_dir()
    if not (inside or first in ("", ".", "..") or name.startswith("~") or name.count("/") > 1):
        return
    hint = f" (there is a folder {first!r}, so it is not taken for a name on the hub)" if inside else ""
    raise ValueError(f"{what}={name!r}: no such folder{hint}; give a folder, a preset of conf/model or OWNER/NAME")

"""Config keys, tensor names and sizes of native exports against what vLLM and llama.cpp read; neither is run here.

What they read was taken from their sources (docs/loading.md says which); the table there must say what comes out here.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from iskd.commands.build.within_budget import LOSES, opened_elsewhere
from iskd.export.student import write
from iskd.models import surgery
from iskd.plan import Edit, Record, Remove, Replace, Spec
from tests.factories import FAMILIES, tiny, windows

DOCS = Path(__file__).resolve().parents[2] / "docs" / "loading.md"
HIDDEN, MLP, LAYERS = 48, 192, 4  # four times as wide: GPT-2's and Phi's converters take no other width
Shapes = dict[str, list[int]]
Config = dict[str, Any]


def slim(kv_groups: int, channels: int) -> list[Edit]:
    sizes = {"kv_groups": kv_groups, "channels": channels}
    return [Replace(layer, Spec("iskd.blocks.slim.Slim", sizes)) for layer in range(LAYERS)]


# name of the column: edits; grouped families have 3 groups of 2 heads, the others 6 heads
KINDS: dict[str, Callable[[bool], list[Edit]]] = {
    "layers removed": lambda grouped: [Remove(1)],
    "fewer heads": lambda grouped: slim(2 if grouped else 4, MLP),
    "fewer channels": lambda grouped: slim(3 if grouped else 6, 64),
}
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma")


@dataclass(frozen=True)
class Loader:
    """What one loader reads of one family.

    Attributes:
        architecture: as it is registered.
        keys: of config.json, without which it raises.
        queries: rows of the query projection that it expects.
        channels: width of the MLP that it expects.
        names: tensors it takes; {i} = layer. None: those of the gguf package, by this architecture.
        gguf: name of the architecture there.
    """

    architecture: str
    keys: tuple[str, ...]
    queries: Callable[[Config], int]
    channels: Callable[[Config], int]
    names: frozenset[str] | None = None
    gguf: str = ""


def expand(*patterns: str) -> frozenset[str]:
    """Names out of "a.(b|c).weight": every choice of every bracket."""
    found = set()
    for pattern in patterns:
        choices = [piece.strip("()").split("|") for piece in re.split(r"(\([^)]*\))", pattern)]
        found |= {"".join(choice) for choice in itertools.product(*choices)}
    return frozenset(found)


def stated(config: Config) -> int:
    """Heads times the width that the config states, or derives where it does not."""
    return int(config["num_attention_heads"] * (config.get("head_dim") or derived_width(config)))


def derived_width(config: Config) -> int:
    return int(config["hidden_size"] // config["num_attention_heads"])


def derived(config: Config) -> int:
    """Heads times hidden / heads, whatever `head_dim` says."""
    return int(config["num_attention_heads"] * derived_width(config))


def stream(config: Config) -> int:
    """As wide as the stream."""
    return int(config.get("hidden_size") or config["n_embd"])


def key(name: str) -> Callable[[Config], int]:
    return lambda config: int(config[name])


def inner(config: Config) -> int:
    return int(config.get("n_inner") or 4 * stream(config))


def fourfold(config: Config) -> int:
    return 4 * stream(config)


BOTH = "(weight|bias)"
ATTENTION, GATED = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp.(gate|up|down)_proj.weight"
NORMS = "model.layers.{i}.(input|post_attention)_layernorm.weight"
ENDS = "(model.embed_tokens|model.norm|lm_head).weight"
LLAMA = expand(ENDS, NORMS, GATED, f"{ATTENTION}(q|k|v|o)_proj.weight")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
GROUPS = (*SIZES, "intermediate_size", "rms_norm_eps", "max_position_embeddings", "hidden_act", "tie_word_embeddings")
LLAMA_KEYS = (*GROUPS, "num_key_value_heads", "rope_parameters", "rope_theta")
GPT2_KEYS = ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size", "layer_norm_epsilon", "activation_function")
width = key("intermediate_size")

VLLM = {
    "llama": Loader("LlamaForCausalLM", LLAMA_KEYS, stated, width, LLAMA),
    "mistral": Loader("MistralForCausalLM", LLAMA_KEYS, stated, width, LLAMA),
    "qwen2": Loader("Qwen2ForCausalLM", LLAMA_KEYS, derived, width, LLAMA | expand(f"{ATTENTION}(q|k|v)_proj.bias")),
    "qwen3": Loader("Qwen3ForCausalLM", LLAMA_KEYS, stated, width, LLAMA | expand(f"{ATTENTION}(q|k)_norm.weight")),
    "gemma": Loader("GemmaForCausalLM", (*LLAMA_KEYS, "head_dim"), stated, width, LLAMA),
    "phi": Loader(
        "PhiForCausalLM",
        (*SIZES, "layer_norm_eps", "hidden_act", "tie_word_embeddings", "rope_parameters"),
        derived,
        inner,
        expand(
            "model.embed_tokens.weight",
            f"(model.final_layernorm|lm_head|model.layers.{{i}}.input_layernorm).{BOTH}",
            f"model.layers.{{i}}.mlp.(fc1|fc2).{BOTH}",
            f"{ATTENTION}(q_proj|k_proj|v_proj|dense).{BOTH}",
        ),
    ),
    "gpt2": Loader(
        "GPT2LMHeadModel",
        (*GPT2_KEYS, "tie_word_embeddings", "add_cross_attention", "scale_attn_by_inverse_layer_idx"),
        stream,
        inner,
        expand(
            "(transformer.wte|transformer.wpe|lm_head).weight",
            f"transformer.ln_f.{BOTH}",
            f"transformer.h.{{i}}.(ln_1|ln_2|attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).{BOTH}",
        ),
    ),
    "gpt_neox": Loader(
        "GPTNeoXForCausalLM",
        (*SIZES, "intermediate_size", "rotary_pct", "use_parallel_residual", "layer_norm_eps", "hidden_act"),
        derived,
        width,
        expand(
            "(gpt_neox.embed_in|embed_out).weight",
            f"gpt_neox.final_layer_norm.{BOTH}",
            f"gpt_neox.layers.{{i}}.(input_layernorm|post_attention_layernorm|attention.dense).{BOTH}",
            f"gpt_neox.layers.{{i}}.(attention.query_key_value|mlp.dense_h_to_4h|mlp.dense_4h_to_h).{BOTH}",
        ),
    ),
    "opt": Loader(
        "OPTForCausalLM",
        (*SIZES, "ffn_dim", "word_embed_proj_dim", "do_layer_norm_before", "enable_bias", "max_position_embeddings"),
        derived,
        key("ffn_dim"),
        expand(
            "(model.decoder.embed_tokens|model.decoder.embed_positions|lm_head).weight",
            f"model.decoder.final_layer_norm.{BOTH}",
            f"model.decoder.layers.{{i}}.self_attn.(q_proj|k_proj|v_proj|out_proj).{BOTH}",
            f"model.decoder.layers.{{i}}.(self_attn_layer_norm|final_layer_norm|fc1|fc2).{BOTH}",
        ),
    ),
}
CONVERTED = (*GROUPS, "num_key_value_heads")
GGUF = {
    "llama": Loader("LlamaForCausalLM", CONVERTED, stated, width, gguf="LLAMA"),
    "mistral": Loader("MistralForCausalLM", CONVERTED, stated, width, gguf="LLAMA"),
    "qwen2": Loader("Qwen2ForCausalLM", CONVERTED, stream, width, gguf="QWEN2"),
    "qwen3": Loader("Qwen3ForCausalLM", CONVERTED, stated, width, gguf="QWEN3"),
    "gemma": Loader("GemmaForCausalLM", (*CONVERTED, "head_dim"), stated, width, gguf="GEMMA"),
    "phi": Loader("PhiForCausalLM", (*SIZES, "layer_norm_eps", "rope_parameters"), stream, fourfold, gguf="PHI2"),
    "gpt2": Loader("GPT2LMHeadModel", (*GPT2_KEYS[:3], "n_ctx", "layer_norm_epsilon"), stream, fourfold, gguf="GPT2"),
    "gpt_neox": Loader(
        "GPTNeoXForCausalLM",
        (*SIZES, "intermediate_size", "rotary_pct", "layer_norm_eps"),
        stream,
        width,
        gguf="GPTNEOX",
    ),
}
# path of the queries below a block, how many of its outputs are queries, path of the MLP's first projection
WHERE = {
    **dict.fromkeys(GROUPED, ("self_attn.q_proj", 1, "mlp.gate_proj")),
    "phi": ("self_attn.q_proj", 1, "mlp.fc1"),
    "gpt2": ("attn.c_attn", 3, "mlp.c_fc"),
    "gpt_neox": ("attention.query_key_value", 3, "mlp.dense_h_to_4h"),
    "opt": ("self_attn.q_proj", 1, "fc1"),
}


def verdict(loader: Loader | None, family: str, config: Config, shapes: Shapes) -> str:
    """Is "yes" where architecture, keys, names and sizes are those that the loader asks for."""
    if loader is None or config["architectures"] != [loader.architecture]:
        return "no"
    if any(config.get(name) is None for name in loader.keys):
        return "no"
    if not takes(loader, config, shapes):
        return "no"
    queries, fused, mlp = WHERE[family]
    axis = 1 if family == "gpt2" else 0  # Conv1D: [in, out]
    sizes = {path: next(s for n, s in shapes.items() if f"0.{path}.weight" in n)[axis] for path in (queries, mlp)}
    fits = sizes[queries] == fused * loader.queries(config) and sizes[mlp] == loader.channels(config)
    return "yes" if fits else "no"


def takes(loader: Loader, config: Config, shapes: Shapes) -> bool:
    """Whether every tensor has a place, and every place of a native model its tensor."""
    depth = int(config.get("num_hidden_layers") or config["n_layer"])
    if loader.names is not None:
        wanted = {name.format(i=layer) for name in loader.names for layer in range(depth)}
        spare = {"lm_head.weight", "embed_out.weight"} if config.get("tie_word_embeddings") else set()
        return wanted - spare <= shapes.keys() <= wanted
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[loader.gguf], depth)
    return all(names.get_name(name, try_suffixes=(".weight", ".bias")) is not None for name in shapes)


def native_export(family: str, kind: str, folder: Path, **keys: Any) -> tuple[Config, Shapes] | None:
    """The config and the tensors' shapes of an export; None where it is not native."""
    sizes: dict[str, Any] = {"hidden": HIDDEN, "mlp": MLP, "layers": LAYERS, **keys}
    model = tiny(family, **sizes)
    record = surgery.apply(model, Record(LAYERS), KINDS[kind](family in GROUPED))
    if not write(folder, model, record, tiny(family, **sizes).config):
        return None
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as weights:
        shapes = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return config, shapes


def documented() -> dict[str, list[str]]:
    """The table of docs/loading.md: cells by family."""
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in FAMILIES}


def test_the_page_names_the_families_that_it_says_nothing_of() -> None:
    _, _, said = DOCS.read_text(encoding="utf-8").partition("The sources for ")
    named = set(re.findall(r"`(\w+)`", said.split(" were")[0]))
    assert named == {family for family in FAMILIES if family not in VLLM}


@pytest.mark.parametrize("family", VLLM)
def test_the_table_is_what_the_names_and_sizes_say(family: str, tmp_path: Path) -> None:
    found = []
    for kind in KINDS:
        export = native_export(family, kind, tmp_path / kind)
        for loader in (VLLM.get(family), GGUF.get(family)):
            found.append("-" if export is None else verdict(loader, family, *export))
    assert found == documented()[family]
    for what, at in (("heads", 2), ("channels", 4)):
        lost = any((kept, cell) == ("yes", "no") for kept, cell in zip(found[:2], found[at : at + 2], strict=True))
        assert lost == (family in LOSES[what]), "what budget.native leaves out"


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gpt2", "opt"])
def test_a_native_budget_takes_what_loaders_open(family: str) -> None:
    for kind, what in (("layers removed", ""), ("fewer heads", "heads"), ("fewer channels", "channels")):
        model = tiny(family, hidden=HIDDEN, mlp=MLP, layers=LAYERS)
        surgery.apply(model, Record(LAYERS), KINDS[kind](family in GROUPED))
        native = family in GROUPED or family == "phi" or what != "heads"
        assert opened_elsewhere(model) == (native and not (what and family in LOSES[what]))


@pytest.mark.filterwarnings("ignore")
def test_vllms_own_registry_has_the_architectures_of_the_table() -> None:
    """Where vLLM can be imported, which needs no GPU; building a model of it does."""
    pytest.importorskip("vllm")
    known = pytest.importorskip("vllm.model_executor.models").ModelRegistry.get_supported_archs()
    assert {loader.architecture for loader in VLLM.values()} <= set(known)
    assert "IskdForCausalLM" not in known


def test_the_check_notices_what_is_not_there(tmp_path: Path) -> None:
    """A key, a tensor or a row less, or a norm that the loader does not know, is a no."""
    export = native_export("llama", "layers removed", tmp_path / "llama")
    assert export is not None
    config, shapes = export
    loader = VLLM["llama"]
    assert verdict(loader, "llama", config, shapes) == "yes"
    assert verdict(loader, "llama", {**config, "rope_theta": None}, shapes) == "no"
    assert verdict(loader, "llama", config, {**shapes, "model.layers.0.extra.weight": [1]}) == "no"
    assert verdict(loader, "llama", config, {n: s for n, s in shapes.items() if n != "model.norm.weight"}) == "no"
    assert verdict(loader, "llama", {**config, "head_dim": 16}, shapes) == "no"
    normed = native_export("phi", "layers removed", tmp_path / "phi", qk_layernorm=True)
    assert normed is not None
    assert verdict(VLLM["phi"], "phi", *normed) == verdict(GGUF["phi"], "phi", *normed) == "no"


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e5}


@pytest.mark.parametrize(
    ("family", "rope", "said"),
    [
        ("llama", PLAIN, {"rope_theta": 1e5}),
        ("llama", {**LLAMA3, "original_max_position_embeddings": 32}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ("phi", {**PLAIN, "partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.25, "n_inner": MLP}),
        ("gpt_neox", {**PLAIN, "partial_rotary_factor": 0.5}, {"rotary_pct": 0.5, "rotary_emb_base": 1e5}),
    ],
)
def test_rotary_angles_are_said_the_old_way_too(
    family: str, rope: dict[str, Any], said: dict[str, Any], tmp_path: Path
) -> None:
    """Loaders of transformers 4 know no `rope_parameters` and would go on with their default; 5 reads both alike."""
    export = native_export(family, "layers removed", tmp_path, rope_parameters=rope)
    assert export is not None
    for name, value in said.items():
        if isinstance(value, dict):
            assert {key: export[0][name][key] for key in value if key != "rope_theta"} == {
                key: number for key, number in value.items() if key != "rope_theta"
            }
        else:
            assert export[0][name] == value
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.config.rope_parameters == tiny(family, rope_parameters=rope).config.rope_parameters
    old = {name: value for name, value in export[0].items() if name != "rope_parameters"}
    if "rope_scaling" not in said:
        assert AutoConfig.for_model(**old).rope_parameters == model.config.rope_parameters, "the old keys say it all"
    reference = tiny(family, mlp=MLP, layers=LAYERS, rope_parameters=rope)
    surgery.apply(reference, Record(LAYERS), [Remove(1)])
    with torch.no_grad():
        torch.testing.assert_close(model(windows()).logits, reference(windows()).logits, atol=1e-6, rtol=1e-5)

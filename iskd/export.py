"""A student on disk that others can load: written, then reopened in a fresh process before it counts.

A student that some config of the teacher's own architecture describes (nothing edited, layers removed, all layers
slimmed to the same sizes) is written with that config and loads with plain transformers. Any other is written with
`model_type: iskd`, its record and its teacher's config; it loads with `iskd.load(dir)`, or
`AutoModelForCausalLM.from_pretrained(dir)` after `import iskd`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from iskd.arch import Stack
from iskd.blocks.slicing import inputs_of
from iskd.checkpoint import model_tensors
from iskd.plan import Record, allowed, to_json

WEIGHTS = "model.safetensors"
# What an attention computes with besides its weights, derived from the config and its place when it is built.
_DERIVED = ("scaling", "head_dim", "sliding_window")


class IskdConfig(PreTrainedConfig):
    """What a student is: the teacher's config and the record of edits."""

    model_type = "iskd"

    def __init__(
        self, teacher: dict[str, Any] | None = None, record: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.teacher = teacher or {}
        self.record = record or {}
        super().__init__(**kwargs)


class Student:
    """Mixed into a loaded student's class, so that `save_pretrained` writes what loading needs.

    Plain transformers would write the teacher's config, and loading that would fill the compact blocks' places with
    random full-size ones and only warn.
    """

    iskd_record: Record
    iskd_teacher_config: PreTrainedConfig

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        """Write the student with its record."""
        write(Path(save_directory), cast(PreTrainedModel, self), self.iskd_record, self.iskd_teacher_config)


@cache
def student_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The teacher's own class with `Student` mixed in."""
    return type(f"Iskd{cls.__name__}", (Student, cls), {})


def _stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    return next(cls for cls in type(model).__mro__ if issubclass(cls, PreTrainedModel) and not issubclass(cls, Student))


def native_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """The config from which the teacher's own class builds this very student, or None when no config can say it.

    Depth and per-layer lists are true since the edits. Sizes are read off the first block: heads that left need an
    explicit `head_dim`, which Llama, Mistral, Gemma, Qwen3 declare and Qwen2 and Phi take; GPT-2, GPT-NeoX and OPT
    derive it from their width, so that only their MLPs can be smaller. Whether the other blocks are alike is found by
    building the model without memory. Sizes that differ from layer to layer would need `per_layer_config`, on which
    stock Llama and its kin of transformers 5.23 raise `AmbiguousGlobalPerLayerAttributeError`.
    """
    stack = Stack(model)
    dims, family, block = stack.dims, stack.family, stack.layers[0]
    config = copy.deepcopy(model.config)
    try:
        heads = inputs_of(block.get_submodule(family.out)) // dims.head_dim
        channels = inputs_of(block.get_submodule(family.down))
        if channels != dims.mlp:
            setattr(config, family.mlp_size, channels)
        if heads != dims.heads:
            config.head_dim, config.num_attention_heads = dims.head_dim, heads
            if getattr(config, "num_key_value_heads", None) is not None:
                config.num_key_value_heads = heads * dims.kv_heads // dims.heads
        # as it will be read, checks of the family included
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            stock = _stock_class(model)(config)
    except (AttributeError, ValueError, StrictDataclassError):
        return None  # the block has no such parts, or the family no such sizes
    return config if _build_of(stock) == _build_of(model) else None


def _build_of(model: PreTrainedModel) -> tuple[dict[str, Any], ...]:
    """Everything about a model but the values of its weights."""
    modules = {name: module for name, module in model.named_modules() if name}
    return (
        {name: type(module) for name, module in modules.items()},
        {name: tensor.shape for name, tensor in chain(model.named_parameters(), model.named_buffers())},
        {f"{name}.{key}": vars(module).get(key) for name, module in modules.items() for key in _DERIVED},
    )


def write(
    target: Path,
    model: PreTrainedModel,
    record: Record,
    teacher_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> bool:
    """Write config, weights, record, generation config and tokenizer into the folder `target`.

    Returns whether plain transformers can load it, see `native_config`.
    """
    target.mkdir(parents=True, exist_ok=True)
    native = native_config(model)
    if native is not None:
        PreTrainedModel.save_pretrained(model, target)
        native.architectures, native.dtype = [_stock_class(model).__name__], model.dtype
        native.save_pretrained(target)
    else:
        teacher = {key: value for key, value in teacher_config.to_dict().items() if key != "_name_or_path"}
        config = IskdConfig(teacher=teacher, record=to_json(record), architectures=["IskdForCausalLM"])
        config.save_pretrained(target)
        save_file(model_tensors(model), target / WEIGHTS, metadata={"format": "pt"})
        if model.generation_config is not None:
            model.generation_config.save_pretrained(target)
    (target / "record.json").write_text(json.dumps(to_json(record), indent=1))
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return native is not None


_CHECK = """
import json, sys
import torch
folder, native = sys.argv[1], sys.argv[2] == "native"
if native:
    sys.modules["iskd"] = None
else:
    import iskd
    for prefix in json.loads(sys.argv[4]):
        iskd.plan.allow(prefix)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
probe = json.load(open(sys.argv[3]))
with torch.no_grad():
    logits = model(torch.tensor(probe["ids"])).logits
    text = model.generate(torch.tensor(probe["ids"])[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
json.dump({"logits": logits[:, -1].tolist(), "text": text.tolist()}, open(sys.argv[3], "w"))
"""


@torch.no_grad()
def export(
    target: Path,
    model: PreTrainedModel,
    record: Record,
    teacher_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    verify: bool = True,
) -> Path:
    """Write a student to `target`, replacing an earlier export, and reopen it in a fresh process.

    Raises:
        RuntimeError: the reopened student gives other logits or another greedy text; nothing is left at `target`.
    """
    was_training = model.training
    model.eval()
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        native = write(draft, model, record, teacher_config, tokenizer)
        if verify:
            _verify(draft, model, native=native)
    except Exception:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        model.train(was_training)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    return target


def _verify(folder: Path, model: PreTrainedModel, *, native: bool) -> None:
    """Equal logits and equal greedy text in a process that knows nothing of this one."""
    vocabulary = int(model.config.vocab_size)
    ids = torch.randint(0, vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    probe = folder.with_name(f"{folder.name}.probe.json")
    probe.write_text(json.dumps({"ids": ids.tolist()}))
    try:
        run = subprocess.run(
            [
                sys.executable,
                "-c",
                _CHECK,
                str(folder),
                "native" if native else "iskd",
                str(probe),
                json.dumps(allowed()),
            ],
            capture_output=True,
            text=True,
            timeout=900,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
            },
        )
        if run.returncode:
            raise RuntimeError(
                f"the exported student does not load in a fresh process: {run.stderr.strip().splitlines()[-1:]}"
            )
        found = json.loads(probe.read_text())
    finally:
        probe.unlink(missing_ok=True)
    # the fresh process computes on the CPU in float32; a near-tie in the text must not depend on the device
    if next(model.parameters()).device.type != "cpu":
        model = copy.deepcopy(model)
        nn.Module.to(model, "cpu")
    logits = model(ids).logits[:, -1]
    text = cast(Any, model).generate(ids[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    error = (torch.tensor(found["logits"]) - logits).abs().max().item()
    tolerance = 1e-4 * max(1.0, logits.abs().max().item())
    if not error <= tolerance:
        raise RuntimeError(f"the exported student gives other logits after loading: largest difference {error:.3g}")
    if found["text"] != text:
        raise RuntimeError("the exported student generates another greedy text after loading")

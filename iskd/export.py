"""A student on disk that others can load, and loading it back.

A student without foreign parts (nothing edited, or layers removed only) is written as the teacher's own architecture
and loads with plain transformers. Any other is written with `model_type: iskd`, its record and its teacher's config;
it loads with `iskd.load(dir)`, or `AutoModelForCausalLM.from_pretrained(dir)` after `import iskd`. Every export is
reopened in a fresh process before it counts.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from iskd import surgery
from iskd.checkpoint import load_model_tensors, model_tensors
from iskd.plan import Record, Remove, allowed, record_from_json, to_json

WEIGHTS = "model.safetensors"


class IskdConfig(PreTrainedConfig):
    """What a student is: the teacher's config and the record of edits."""

    model_type = "iskd"

    def __init__(
        self, teacher: dict[str, Any] | None = None, record: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.teacher = teacher or {}
        self.record = record or {}
        super().__init__(**kwargs)


class IskdForCausalLM(PreTrainedModel):
    """Stands in transformers' registry; loading returns the teacher's own class with the record applied."""

    config_class = IskdConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a student; `dtype` is honoured, other loading options are refused because they would be ignored."""
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        for harmless in (
            "config",
            "trust_remote_code",
            "_from_auto",
            "adapter_kwargs",
            "local_files_only",
            "_commit_hash",
        ):
            kwargs.pop(harmless, None)
        unknown = [key for key, value in kwargs.items() if value is not None]
        if args or unknown:
            raise ValueError(
                f"iskd students do not take the loading option {unknown[0] if unknown else args[0]!r}; "
                "load first, then move or wrap the model"
            )
        model = load(Path(pretrained_model_name_or_path))
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        return nn.Module.to(model, dtype) if isinstance(dtype, torch.dtype) else model


def register() -> None:
    """Tell transformers' Auto classes about students; `import iskd` calls it once."""
    AutoConfig.register("iskd", IskdConfig, exist_ok=True)
    AutoModelForCausalLM.register(IskdConfig, IskdForCausalLM, exist_ok=True)


def is_native(record: Record) -> bool:
    """Whether the student is the teacher's own architecture, only with fewer layers."""
    return all(isinstance(edit, Remove) for edit in record.edits)


class _Student:
    """Mixed into a loaded student's class, so that `save_pretrained` writes what loading needs.

    Plain transformers would write the teacher's config, and loading that would fill the compact blocks' places with
    random full-size ones and only warn.
    """

    iskd_record: Record
    iskd_teacher_config: PreTrainedConfig

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        """Write the student with its record."""
        write(Path(save_directory), self, self.iskd_record, self.iskd_teacher_config)  # type: ignore[arg-type]


def write(
    target: Path,
    model: PreTrainedModel,
    record: Record,
    teacher_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write config, weights, record, generation config and tokenizer into the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    if is_native(record):
        PreTrainedModel.save_pretrained(model, target)
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


def load(directory: str | os.PathLike[str]) -> PreTrainedModel:
    """Load an exported student, in float32 and evaluation mode.

    Raises ValueError when the folder is not a student, its record names a class outside the allow-list, or its
    weights do not fit its record.
    """
    folder = Path(directory)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder} is not a model directory: config.json is missing")
    data = json.loads(config_file.read_text())
    if data.get("model_type") != "iskd":
        options = {"use_safetensors": True, "trust_remote_code": False}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    record = record_from_json(data.get("record", {}))
    teacher = dict(data.get("teacher", {}))
    kind = teacher.pop("model_type", None)
    if not isinstance(kind, str):
        raise ValueError(f"{config_file}: teacher.model_type is missing")
    teacher_config = AutoConfig.for_model(kind, **teacher)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(teacher_config), dtype=torch.float32)
        surgery.apply(model, Record(record.num_layers), record.edits)
    try:
        load_model_tensors(model, load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    generation = folder / "generation_config.json"
    if generation.is_file() and model.generation_config is not None:
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    model.__class__ = type(f"Iskd{type(model).__name__}", (_Student, type(model)), {})
    model.iskd_record, model.iskd_teacher_config = record, teacher_config
    return model.eval()


_CHECK = """
import json, sys
import torch
folder, native = sys.argv[1], sys.argv[2] == "native"
if not native:
    import iskd
    for prefix in json.loads(sys.argv[4]):
        iskd.plan.allow(prefix)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
probe = json.load(open(sys.argv[3]))
with torch.no_grad():
    logits = model(torch.tensor(probe["ids"])).logits
    text = model.generate(torch.tensor(probe["ids"])[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
json.dump({"logits": logits[:, -1].tolist(), "text": text.tolist(), "iskd": "iskd" in sys.modules}, open(sys.argv[3],
"w"))
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
        write(draft, model, record, teacher_config, tokenizer)
        if verify:
            _verify(draft, model, native=is_native(record))
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
    if native and found["iskd"]:
        raise RuntimeError("a native export must load without iskd")

"""Config -> objects. With cli.py and train.py the only code that knows Hydra; no DictConfig leaves this file."""

from __future__ import annotations

import inspect
import netrc
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from iskd.arch import Stack
from iskd.busy import Busy
from iskd.corpus import Source, TextFiles
from iskd.data import TextData
from iskd.evaluate import EvalSpec, check
from iskd.finish import selected
from iskd.importance.angular import Angular, angular_windows
from iskd.importance.base import rows_of
from iskd.losses.base import Terms
from iskd.options import RunOptions
from iskd.parts import Parts
from iskd.plan import Spec, allowed
from iskd.ranks import global_rank
from iskd.teacher_rows import CacheSpec, check_terms_cached
from iskd.teachers import Loaded, load_teacher
from iskd.text_score import refuse_training_text
from iskd.tracking import sweep_of

SAVED = "config.yaml"
_OURS = ("iskd.", "lightning.pytorch.loggers.")
# what may differ when a run is continued: nothing that changes its numbers
_FREE = ("resume", "logger", "trainer.progress", "cache_dir", "hydra", "eval", "objectives", "reference", "profile")
# what a resumed run may change: how its batches lie over processes (`RunState.take_up` says where), and its upkeep
_LAYOUT = ("devices", "num_nodes", "strategy", "accumulate_grad_batches")
_CHANGES = (
    *(f"trainer.{key}" for key in _LAYOUT),
    *("data.batch_size", "run.checkpoint_every", "run.keep", "run.max_skipped", "run.on_oom", "run.checkpoints"),
    *("run.mfu", "run.efficiency_seconds", "run.max_shard_bytes", "run.share_prefix"),
    *("run.gradient_checkpointing", "run.compile"),
    *("schedule.restart_at_edit", "export"),
)


def plain(config: Any) -> Any:
    """Containers of a config as dicts and lists, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def part(config: DictConfig, **runtime: Any) -> Any:
    """Build the object of a node with `_target_`.

    Runtime objects are passed by a call of our own: Hydra would turn dataclasses among its arguments into configs.
    """
    return instantiate(config, _partial_=True, _convert_="all")(**runtime)


def spec(config: DictConfig) -> Spec:
    """A part that is stamped once per layer, as data."""
    values = plain(config)
    return Spec(values.pop("_target_"), values)


def parts(config: DictConfig, run_dir: Path, *, teacher: Loaded | None = None, source: Source | None = None) -> Parts:
    """All objects of a run, and the resolved config beside its results.

    `teacher` and `source` stand for what `model` and `data` name, where a caller has them in memory.
    """
    resuming = config.resume is not None
    _claim(run_dir, resuming)
    if teacher is None:
        with Busy("loading the teacher"):
            teacher = load_teacher(part(config.model))
    stack = Stack(teacher.model)
    data = _data(config, teacher.tokenizer, stack, source)
    runtime = {} if "NoEdits" in config.schedule._target_ else {"edit": _edit(config), "seed": config.seed}
    schedule = part(config.schedule, **runtime)
    losses = terms(plain(config.loss))
    importance = part(config.importance)
    asked = _evaluation(config, teacher, importance, data)
    settings: dict[str, Any] = plain(config.trainer)
    settings["precision"] = precision(settings.get("precision", "auto"), settings.get("accelerator", "cpu"))
    if not resuming and global_rank() == 0:
        _save_config(config, run_dir)
    return Parts(
        teacher=teacher,
        data=data,
        schedule=schedule,
        terms=losses,
        run_dir=run_dir,
        importance=importance,
        optim=part(config.optim),
        options=RunOptions(**plain(config.run), plan_only=config.plan_only),
        trainer=settings,
        loggers=_loggers(config, run_dir),
        chunk=config.chunk,
        seed=config.seed,
        resume=resuming,
        export=_export(config.export),
        evaluation=asked,
        cache=_teacher_cache(config, losses),
    )


def _export(value: object) -> bool:
    """`true` and `hf` write the student as a model directory, `false` does not."""
    if value not in (True, False, "hf"):
        raise ValueError(
            f"export={value}: choose hf (or true) or false; what vLLM and llama.cpp read of such a directory is in "
            "docs/loading.md"
        )
    return bool(value)


def _evaluation(config: DictConfig, teacher: Loaded, importance: object, data: TextData) -> EvalSpec | None:
    """What the student is asked at the end of the run; that it can be asked is found out now, not after hours."""
    if not config.get("eval"):
        return None
    spec: EvalSpec = part(config.eval)
    if spec.efficiency_seconds:
        raise ValueError("eval.efficiency_seconds is of iskd evaluate; for a run set run.efficiency_seconds")
    if spec.text is not None:
        refuse_training_text(spec.text, data.source.fingerprint())
    if global_rank() == 0:
        check(spec, teacher, exclude=[sha for items in selected(importance).values() for sha in items])
    return spec


def _teacher_cache(config: DictConfig, losses: Terms) -> CacheSpec | None:
    """How the teacher's answers are kept, or None; checked against the losses before anything runs."""
    values: dict[str, Any] = plain(config.get("teacher") or {})
    kind = values.pop("cache", None)
    if kind is None:
        return None
    check_terms_cached(losses, kind)
    return CacheSpec(kind, **values)


def importance_rows(config: DictConfig) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
    """Rows [L, W] of the configured importance on the model as it is, and the numbers of its layers.

    Third is what `angular` says of every run of consecutive layers [L - 1, L] (`iskd.importance.angular`), None of
    other importances. The windows are `run.score_tokens` of the calibration split; the precision is the trainer's.
    """
    teacher = load_teacher(part(config.model))
    stack = Stack(teacher.model.eval())
    data = _data(config, teacher.tokenizer, stack)
    stack.keep_apart(data.separator)
    windows = data.calibration(config.run.score_tokens)
    wanted = config.trainer.accelerator
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(teacher.model, device)
    mixed = precision(config.trainer.precision, wanted) == "bf16-mixed"
    batches = [batch.to(device) for batch in windows]
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        importance, depth = part(config.importance), len(stack.layers)
        rows = rows_of(importance, teacher.model, teacher.model, batches)
        runs = None
        if isinstance(importance, Angular) and depth > 1:
            runs = angular_windows(teacher.model, batches, depth - 1, importance.tokens)
    return rows, tuple(range(depth)), runs


def _edit(config: DictConfig) -> Any:
    """What is done to a layer, with the block or mixer that it asks for as data."""
    asked = inspect.signature(get_class(config.edit._target_)).parameters
    return part(config.edit, **{key: spec(config[key]) for key in ("block", "mixer") if key in asked})


def _claim(run_dir: Path, resuming: bool) -> None:
    """A directory belongs to one run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resuming and (run_dir / SAVED).exists() and global_rank() == 0:
        raise ValueError(
            f"{run_dir} holds another run; choose another hydra.run.dir, or continue that run with resume={run_dir}"
        )


def _save_config(config: DictConfig, run_dir: Path) -> None:
    """Whole or not at all: with resume=auto other ranks, and the next start of the job, look for this file."""
    draft = run_dir / f".{SAVED}.draft"
    OmegaConf.save(OmegaConf.create(plain(config)), draft)
    os.replace(draft, run_dir / SAVED)


def _data(config: DictConfig, tokenizer: Any, stack: Stack, given: Source | None = None) -> TextData:
    values: dict[str, Any] = dict(config.data)
    described = values.pop("source")
    source = part(described) if given is None else given
    files = {key: values.pop(key, None) for key in ("path", "val_path", "test_path")}
    if given is None and files["path"] is not None:
        # a local copy of a known data set keeps that set's way of reading
        reading = {key: getattr(source, key) for key in ("fmt", "field", "detokenize") if hasattr(source, key)}
        source = TextFiles(**files, **reading)
    elif given is None and (files["val_path"] or files["test_path"]) and not isinstance(source, TextFiles):
        raise ValueError("data.val_path and data.test_path belong to a local copy: set data.path=FILE too")
    return TextData(
        source,
        tokenizer,
        cache_dir=Path(config.cache_dir or "~/.cache/iskd").expanduser() / "data",
        seed=config.seed,
        max_context=stack.context,
        vocab_size=int(stack.config.vocab_size),
        **{key: plain(value) for key, value in values.items()},
    )


def terms(losses: Mapping[str, Mapping[str, Any]]) -> Terms:
    """Loss and weight by name, from the multi-select group `loss`."""
    built = {}
    for name, values in losses.items():
        kwargs = dict(values)
        weight = kwargs.pop("weight", 1.0)
        built[name] = (instantiate(kwargs, _convert_="all"), weight)
    return built


def precision(asked: str, accelerator: str) -> str:
    """`auto`: bf16 autocast on a GPU that has it and on a CPU with bf16 matrix units, else float32."""
    if asked.startswith("16"):
        raise ValueError(f"trainer.precision={asked}: fp16 overflows in distillation losses; use bf16-mixed or 32-true")
    if asked != "auto":
        return asked
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if fast_bf16() else "32-true"


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX tiles or AVX-512 BF16); elsewhere float32 is faster."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and check() for check in checks)


def _loggers(config: DictConfig, run_dir: Path) -> list[Any]:
    """The chosen logger beside metrics.csv, writing inside the run directory."""
    node = config.logger
    if "_target_" not in node:
        return []
    values = plain(node)
    if node["_target_"].endswith(".WandbLogger"):
        if values.get("offline") == "auto":
            values["offline"] = not (os.environ.get("WANDB_API_KEY") or _has_login("api.wandb.ai"))
        values["name"] = values.get("name") or run_dir.name
        values["group"] = values.get("group") or sweep_of(run_dir)
    return [instantiate({**values, "save_dir": str(run_dir)}, _convert_="all")]


def _has_login(host: str) -> bool:
    """Whether ~/.netrc names the host."""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def resumed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of a run to continue. Raises ValueError when the command line changes a key of it."""
    run_dir = Path(config.resume)
    saved_file = run_dir / SAVED
    if not saved_file.is_file():
        raise ValueError(f"resume={run_dir}: no {SAVED} in there, so it is not the folder of a run")
    saved = OmegaConf.load(saved_file)
    assert isinstance(saved, DictConfig)
    _refuse_foreign(saved, config, saved_file)
    saved.trainer.progress = config.trainer.progress
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key.split(".")[0] in _FREE or key in _FREE:
            continue
        if key == "trainer":  # another preset: its layout counts, its precision must be the same
            for name in _LAYOUT:
                saved.trainer.pop(name, None)
            saved.trainer.update({name: config.trainer[name] for name in _LAYOUT if name in config.trainer})
        if key in _CHANGES:
            OmegaConf.update(saved, key, OmegaConf.select(config, key), force_add=True)
            continue
        before, now = OmegaConf.select(saved, key), OmegaConf.select(config, key)
        if plain(before) != plain(now):
            raise ValueError(
                f"resume continues a run as it was, but {key} is {plain(before)!r} there and {plain(now)!r} here; "
                "drop it, or start a new run"
            )
    if any(override.partition("=")[0].lstrip("+~") in ("experiment", "debug") for override in overrides):
        _refuse_other_preset(saved, config)
    saved.resume = str(run_dir)
    for key in ("logger", "cache_dir", "eval", "objectives"):
        saved[key] = config.get(key)
    return saved


def _refuse_foreign(saved: DictConfig, config: DictConfig, file: Path) -> None:
    """The folder of a run may come from anywhere, and Hydra would import and call whatever its config names.

    Accepted are classes of this package and of packages allowed in code, and what this command line names itself.
    """
    own = set(_targets(plain(config)))
    for target in set(_targets(plain(saved))) - own:
        found = get_object(target) if str(target).startswith((*_OURS, *allowed())) else None
        if not isinstance(found, type) or not f"{found.__module__}.".startswith((*_OURS, *allowed())):
            raise ValueError(
                f"{file} names {target!r:.80}, which is no part of iskd; if you trust it, name it on the command line "
                "too, or call iskd.plan.allow('its.package.')"
            )
    if OmegaConf.select(saved, "model.trust_remote_code") and not OmegaConf.select(config, "model.trust_remote_code"):
        raise ValueError(
            f"{file} would run code that comes with the teacher; if you trust it, add model.trust_remote_code=true"
        )


def _targets(values: Any) -> Iterator[Any]:
    """Every `_target_` in nested containers."""
    if isinstance(values, dict):
        yield from (value for key, value in values.items() if key == "_target_")
    for item in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _targets(item)


def _refuse_other_preset(saved: DictConfig, config: DictConfig) -> None:
    """A preset is no key of the config: compare what it sets."""
    before, now = _flat(plain(saved)), _flat(plain(config))
    for key in sorted(before.keys() | now.keys()):
        free = key in _FREE or key.split(".")[0] in _FREE or key in _CHANGES
        if not free and before.get(key) != now.get(key):
            raise ValueError(
                f"resume continues a run as it was, but the preset sets {key} to {now.get(key)!r} and it is "
                f"{before.get(key)!r} there; drop the preset, or start a new run"
            )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted key."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for name, item in values.items() for k, v in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}

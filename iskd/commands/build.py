"""The objects of a run from its configuration: teacher, text, schedule, losses, optimizer, trainer, loggers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from iskd.commands.config import as_meant, class_of, object_of, plain, spec, terms
from iskd.commands.line.steps import GROUPS, steps_as_meant
from iskd.data import BATCH, HubDataset, Source, TextData, TextFiles, framing_of
from iskd.data.mix import Mix, mapped, named, sources_of
from iskd.data.sources import as_chats, pinned
from iskd.evaluation import EvalSpec, refuse_training_text
from iskd.evaluation.evaluator import check
from iskd.export import CODES, STORED
from iskd.export.student import native_config
from iskd.importance import AttentionImportance
from iskd.losses import Terms
from iskd.models import Stack
from iskd.models.weights import present_weights
from iskd.plan import Spec
from iskd.plan.failure import told_in
from iskd.plan.options import RunOptions
from iskd.plan.run_files import CONFIG_FILE, FACTS, FAILURE_FILE, LOCK_FILE, refuse_strange, work_in
from iskd.plan.saved_config import read_config
from iskd.plan.token_budget import ON_CPU, ON_GPU, cpu_token_budget, gpu_token_budget
from iskd.report.budget import choice_table
from iskd.report.terminal import print_table, terminal
from iskd.schedules import ConvertTo, EditKind, Schedule
from iskd.schedules.budget import Asked, plan_for, steps_of
from iskd.schedules.edits import EVERY
from iskd.schedules.mixed import Mixed, Step
from iskd.system import Busy, global_rank, run_lock, write_whole
from iskd.system.faults import UnavailableError
from iskd.system.files import expanded, sweep
from iskd.system.machine import called
from iskd.system.precision import device_of
from iskd.system.text import argument
from iskd.system.version import CONF, options
from iskd.teacher import Loaded, TeacherCacheSpec, TeacherSpec, check_terms_cached, load_teacher
from iskd.teacher.load import build_config
from iskd.teacher.origin import find_teacher
from iskd.training import Parts
from iskd.training.facts import selected
from iskd.training.metrics import loggers_of
from iskd.training.profile.plan_ahead import Ahead, chained, first_sentence, plan_ahead
from iskd.training.state.resuming import student_weights

# of the config of every run, from the first version on
_NEEDED = ("model", "data", "edit", "schedule", "loss", "optim", "trainer", "run", "seed")
_LEAST_STEPS = 64  # of a run, where its micro-batches may be smaller (experiments/refit-smollm2: the size of a step)


def parts(config: DictConfig, run_dir: Path, *, teacher: Loaded | None = None, source: Source | None = None) -> Parts:
    """All objects of a run, and the resolved config beside its results.

    `teacher` and `source` stand for what `model` and `data` name, where a caller has them in memory.

    Raises:
        ValueError: a value that its part refuses, or a folder that is not this run's. What is raised once the folder
            is claimed stands in its failure.json.
    """
    config = as_meant(config)  # before the folder is claimed
    resuming = config.resume is not None
    if lost := [key for key in _NEEDED if key not in config]:
        if not resuming:
            raise ValueError(f"{lost[0]}=[] chooses nothing, and without it there is no run: choose one, or drop that")
        where = run_dir / CONFIG_FILE
        raise ValueError(f"{where} has no {', '.join(lost)}, without which there is no run: restore it from a copy")
    try:
        _claim(run_dir, resuming)
        with told_in(run_dir):
            made = _made(config, run_dir, teacher, source, student_weights(run_dir) if resuming else [])
            if not resuming and global_rank() == 0:
                _save_config(config, run_dir)
    except BaseException:
        run_lock.release(run_dir / LOCK_FILE)  # this process may live on for days
        raise
    return made


def plan_without(config: DictConfig, run_dir: Path, error: UnavailableError) -> None:
    """The plan of a run whose model or text cannot be had, from the model's config alone.

    Raises:
        UnavailableError: `error`, where nothing says what sizes the model has.
    """
    config = as_meant(config)
    described: TeacherSpec = object_of(config.model)
    start, record = _student_of(described, config.get("reference")), None
    if start is None and described.config is None and described.path is None:
        raise error
    if config.get("budget"):  # what layers become within it depends on the weights
        raise error
    if start is None:
        model = build_config(replace(described, pretrained=False))
    else:
        model, record = chained(start, config.get("reference"))
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FAILURE_FILE).unlink(missing_ok=True)
    values, source = plain(config.data), plain(config.data).get("source") or {}
    accumulate, trainer = config.trainer.get("accumulate_grad_batches") or 1, config.trainer
    processes = [each for each in (trainer.get("devices"), trainer.get("num_nodes")) if isinstance(each, int)]
    sizes = {"batch": values.get("batch_size") or _batch_of(config), "tokens": values["seq_len"]}
    text = str(values.get("path") or source.get("name") or source.get("_target_", "text").rpartition(".")[2])
    told = _default_tokens(config, lambda: ON_GPU)
    ahead = Ahead(
        config=model,
        record=record,
        every=(config.get("eval") or {}).get("every"),
        schedule=_schedule(config),
        terms=terms(plain(config.loss)),
        optim=object_of(config.optim),
        windows={**sizes, "accumulated": accumulate, "processes": max(1, math.prod(processes))},
        text=text,
        why=first_sentence(error),
        tokens_told=told,
    )
    plan_ahead(ahead, run_dir)


def _made(
    config: DictConfig, run_dir: Path, teacher: Loaded | None, source: Source | None, within: Sequence[Path]
) -> Parts:
    """All objects of a run, of a config whose values are as meant; nothing of the run is written."""
    start: Path | None = None
    importance = importance_of(config)  # what it lacks is said before a teacher is fetched
    if isinstance(importance, AttentionImportance) and class_of(config.edit) is not ConvertTo:
        raise ValueError(
            f"importance={type(importance).__name__.lower()} says which layers keep their attention when the others "
            "are converted: use edit=convert and a mixer, or another importance"
        )
    if teacher is None:
        with Busy("loading the teacher"):
            teacher, start = teacher_of(config, within)
    stack = Stack(teacher.model)
    data = text_data(config, teacher.tokenizer, stack, source)
    told = _default_tokens(config, lambda: len(data.windows("train")) * data.seq_len)
    schedule = _schedule(_within_budget(config, teacher, data, run_dir, start) if config.get("budget") else config)
    losses = terms(plain(config.loss))
    refits = [object_of(config.refit[name]) for name in config.get("refit") or ()]
    if getattr(schedule, "local_share", 0) and not refits:
        raise ValueError(
            f"schedule.local_share={config.schedule.local_share} is for refits of the conversions, and there are none: "
            "set refit=[calibrate,output,local], or schedule.local_share=0"
        )
    asked_export = _export(plain(config.export))
    try:
        asked = _evaluation(config, teacher, [importance, *(step.importance for step in _steps_of(schedule))], data)
    except UnavailableError as error:
        if not config.plan_only:
            raise
        asked = None  # a plan asks nothing
        told = " ".join(filter(None, (told, f"tasks and text are not in the plan's time: {error}")))
    return Parts(
        teacher=teacher,
        data=data,
        schedule=schedule,
        terms=losses,
        run_dir=run_dir,
        importance=importance,
        refits=refits,
        optim=object_of(config.optim),
        options=_options(config),
        trainer=plain(config.trainer),
        loggers=loggers_of(plain(config.logger), run_dir, partial(instantiate, _convert_="all")),
        chunk=config.chunk,
        seed=config.seed,
        resume=config.resume is not None,
        export=asked_export is not None,
        export_dtype=(asked_export or {}).get("dtype", "auto"),
        export_code=(asked_export or {}).get("code", CODES[0]),
        evaluation=asked,
        teacher_cache=_teacher_cache(config, losses),
        tokens_told=told,
        start=start,
    )


def _within_budget(
    config: DictConfig, teacher: Loaded, data: TextData, run_dir: Path, start: Path | None
) -> DictConfig:
    """Search for a plan within the budget, and show it; the config with its steps in the schedule that carries it out.

    The run's own config stays as it was given: the plan lies beside it, and a resumed run finds it there.
    """
    if class_of(config.schedule) is not Mixed:
        raise ValueError("budget= finds the steps of schedule=mixed: set that too, as experiment=budget does")
    if config.schedule.steps:
        raise ValueError("budget= finds the steps of schedule=mixed: leave schedule.steps out, or drop budget=")
    if start is not None:
        raise ValueError(f"budget= plans for a teacher, and {start} is a student: give model= its teacher")
    plan = plan_for(object_of(config.budget), asked_of(config, teacher, data), run_dir)
    if global_rank() == 0:
        print_table(choice_table(plan))
    values = plain(config)
    scheduled = {**values["schedule"], "steps": steps_of(plan)}
    steps_as_meant(scheduled)
    carried = OmegaConf.create({**values, "schedule": scheduled})
    assert isinstance(carried, DictConfig)
    return carried


def asked_of(config: DictConfig, teacher: Loaded, data: TextData) -> Asked:
    """What a search for plans needs of a run."""
    dtype = (_export(plain(config.export)) or {}).get("dtype", "auto")
    return Asked(
        teacher=teacher.model,
        windows=data.calibration,
        separator=data.separator,
        trainer=plain(config.trainer),
        cache_dir=Path(config.cache_dir or expanded("~/.cache/iskd")),
        stored=str(teacher.source.get("stored", "float32")) if dtype == "auto" else dtype,
        seed=config.seed,
        native=lambda model: native_config(model) is not None,
        note=lambda sentence: terminal().print(sentence, soft_wrap=True),
    )


def teacher_of(config: DictConfig, within: Sequence[Path] = ()) -> tuple[Loaded, Path | None]:
    """The teacher of a config, and where `model` names a student, that one's own teacher and its folder.

    Args:
        config: whose values are as meant.
        within: weights that bound a teacher made of what the config describes.

    Raises:
        ValueError: as `load_teacher` and `find_teacher`.
    """
    described: TeacherSpec = object_of(config.model)
    start = _student_of(described, config.get("reference"))
    if start is None:
        return load_teacher(described, within), None
    found = find_teacher(start, config.get("reference"))
    return load_teacher(found, within or present_weights(start)), start


def _student_of(model: TeacherSpec, reference: str | None) -> Path | None:
    """The folder of a student that `model` names, to go on from beside its own teacher; None for any other model.

    `reference` names another teacher; where it is the student itself, that one is taken for the teacher.
    """
    if model.path is None or not (Path(expanded(model.path)) / FACTS).is_file():
        return None
    folder = Path(expanded(model.path))
    same = reference is not None and Path(expanded(reference)).resolve() == folder.resolve()
    return None if same else folder


def _options(config: DictConfig) -> RunOptions:
    """The keys of `run`. Raises ValueError for one that is none."""
    values, known = plain(config.run), [field.name for field in fields(RunOptions) if field.name != "plan_only"]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"run has no key {unknown[0]!r}: drop it, or use one of {', '.join(known)}")
    return RunOptions(**values, plan_only=config.plan_only)


def _export(value: Any) -> dict[str, str] | None:
    """In which type the student is written, and with which code; None = it is not. `true` and `hf` are no keys."""
    if value is False:
        return None
    keys = {} if value in (True, "hf") else value
    if not isinstance(keys, dict):
        raise ValueError(
            f"export={value}: choose hf (or true) or false; what vLLM and llama.cpp read of such a directory is in "
            "docs/loading.md"
        )
    choices = {"dtype": ("auto", *STORED), "code": CODES}
    if unknown := [key for key in keys if key not in choices]:
        raise ValueError(f"export has no key {unknown[0]!r}: drop it, or use dtype or code")
    found = {key: keys.get(key, known[0]) for key, known in choices.items()}
    for key, asked in found.items():
        if asked not in choices[key]:
            raise ValueError(f"export.{key}={asked}: choose one of {', '.join(choices[key])}")
    return {key: str(asked) for key, asked in found.items()}


def _evaluation(config: DictConfig, teacher: Loaded, importances: Sequence[object], data: TextData) -> EvalSpec | None:
    """What the student is asked at the end of the run; that it can be asked is found out now, not after hours."""
    if not config.get("eval"):
        return None
    spec: EvalSpec = object_of(config.eval)
    if not spec.asks and spec.inside:
        return spec
    if spec.efficiency_seconds:
        raise ValueError("eval.efficiency_seconds is of iskd evaluate; for a run set run.efficiency_seconds")
    if spec.text is not None:
        refuse_training_text(spec.text, data.source.fingerprint())
    if global_rank() == 0:
        chosen = [sha for items in selected(*importances).values() for sha in items]
        check(spec, teacher, exclude=chosen, frame=framing_of(teacher.tokenizer, data.bos), seen=data.seen_share)
    return spec


def _teacher_cache(config: DictConfig, losses: Terms) -> TeacherCacheSpec | None:
    """How the teacher's answers are kept, or None; checked against the losses before anything runs."""
    values: dict[str, Any] = plain(config.get("teacher") or {})
    kind = values.pop("cache", None)
    if kind is None:
        return None
    check_terms_cached(losses, kind)
    return TeacherCacheSpec(kind, **values)


def _schedule(config: DictConfig) -> Schedule:
    """The schedule, with what its class takes beside its keys: the edit of a layer and the run's seed."""
    takes = getattr(class_of(config.schedule), "takes", ("edit", "seed"))
    values: dict[str, Any] = {"edit": _edit(config), "seed": config.seed} if takes else {}
    if "parts" in takes:
        steps = config.schedule.steps or ()  # by a call of our own: Hydra would make objects of the parts in them
        return Mixed([_step(step, config) for step in steps], plain(steps), config.schedule.tokens)
    schedule: Schedule = object_of(config.schedule, **{name: values[name] for name in takes})
    return schedule


def _step(step: DictConfig, config: DictConfig) -> Step:
    """A step of `schedule=mixed`, whose parts `steps_as_meant` has named; others are the run's."""
    values, groups = plain(config), (*GROUPS, "schedule")
    own = OmegaConf.create({**values, **{group: plain(step[group]) for group in step if group in groups}})
    refits = [object_of(own.refit[name]) for name in own.get("refit") or ()]
    return Step(_schedule(own), importance_of(own) if "importance" in step else None, refits)


def _steps_of(schedule: Schedule) -> Sequence[Step]:
    return schedule.parts if isinstance(schedule, Mixed) else ()


def _edit(config: DictConfig) -> EditKind:
    """What is done to a layer, with the block or mixer that its class takes as data."""
    takes = getattr(class_of(config.edit), "takes", ())
    values: dict[str, Any] = {group: spec(config[group]) for group in takes}
    if config.edit.get("mixers") is not None:
        values["mixers"] = _mixers(plain(config.edit.mixers))
    edit: EditKind = object_of(config.edit, **values)
    return edit


def _mixers(named: Any) -> dict[str, tuple[Spec, Any]]:
    """Mixers of conf/mixer by name, each with the layers that get it.

    A value is the layers, or a mapping of them (`layers`) and of keys of the mixer that are not as in its file.
    """
    if not isinstance(named, dict):
        raise ValueError(f"edit.mixers={named}: give mixers by name with their layers, as in {{mlstm: odd}}")
    found = {}
    for name, value in named.items():
        if name not in (known := options("mixer")):
            raise ValueError(f"edit.mixers has no mixer {name!r}: choose among {', '.join(known)}")
        keys = dict(value) if isinstance(value, dict) else {"layers": value}
        layers = keys.pop("layers", None)
        if not isinstance(layers, str | list):
            raise ValueError(f"edit.mixers={{{name}: {value}}}: say which layers, as a list or as {' or '.join(EVERY)}")
        config = OmegaConf.load(CONF / "mixer" / f"{name}.yaml")
        if unknown := [key for key in keys if key not in config]:
            raise ValueError(f"edit.mixers: {name} has no key {unknown[0]!r}; it has {', '.join(map(str, config))}")
        found[name] = spec(OmegaConf.merge(config, keys)), layers  # type: ignore[arg-type]
    return found


def _claim(run_dir: Path, resuming: bool) -> None:
    """A directory belongs to one run, and a run to one process: the lock comes before the look, not after it.

    A start that came to nothing, by a mistyped value or a plan, has left no run: its config is replaced.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    refuse_strange(run_dir)
    alone = run_lock.hold(run_dir / LOCK_FILE)
    sweep(run_dir)
    if resuming or global_rank() != 0 or not (run_dir / CONFIG_FILE).exists():
        return
    if not alone or work_in(run_dir) or not _of_a_run(run_dir / CONFIG_FILE):
        raise ValueError(
            f"{run_dir} holds another run; choose another hydra.run.dir, or continue that run with "
            f"{argument('resume', run_dir)}"
        )


def _of_a_run(config_file: Path) -> bool:
    """Whether a run of ours saved it; what somebody else keeps under that name is never replaced."""
    try:
        return all(key in read_config(config_file) for key in _NEEDED)
    except (OSError, ValueError):
        return False


def _save_config(config: DictConfig, run_dir: Path) -> None:
    """Whole or not at all: with resume=auto other ranks, and the next start of the job, look for this file."""
    write_whole(run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(plain(config))))


def text_data(config: DictConfig, tokenizer: Any, stack: Stack, given: Source | None = None) -> TextData:
    """The data module that `data` names; `given` stands for where it would read.

    What a run keeps is written into the config: its batch, and the commits of its data sets.
    """
    apart = ("source", "sources", "chat", "path", "val_path", "test_path")
    values: dict[str, Any] = {key: value for key, value in config.data.items() if key not in apart}
    source = source_of(config, given)
    if values.get("batch_size") is None:
        values["batch_size"] = config.data.batch_size = _batch_of(config)
    cache_dir = Path(config.cache_dir or expanded("~/.cache/iskd")) / "data"
    if config.resume is None:  # a run keeps the commits that it began with, also when it is resumed
        source = mapped(source, partial(pinned, shards=cache_dir))
        for name, each in sources_of(source).items():
            if isinstance(each, HubDataset):
                key = f"sources.{name}.revision" if name else "source.revision"
                OmegaConf.update(config.data, key, each.revision)
    streams = any(getattr(each, "streaming", False) for each in sources_of(source).values())
    if streams and values.get("max_train_tokens") is None:
        values["max_train_tokens"] = max(_streamed(config), config.data.val_tokens, config.data.seq_len)
    return TextData(
        source,
        tokenizer,
        cache_dir=cache_dir,
        seed=config.seed,
        max_context=stack.context,
        vocab_size=int(stack.config.vocab_size),
        chat_loss=_chat_loss(config),
        **{key: plain(value) for key, value in values.items()},
    )


def _streamed(config: DictConfig) -> int:
    """Training tokens that a run takes of a text without an end. Raises ValueError where nobody says how many."""
    schedules = [step.schedule for step in config.schedule.get("steps") or ()] or [config.schedule]
    passes = next((schedule.epochs for schedule in schedules if schedule.get("epochs")), None)
    if passes is not None:
        raise ValueError(
            f"schedule.epochs={passes:g} takes all of the text, and data.source.streaming=true reads as much as a run "
            "takes: set schedule.epochs=null and schedule.tokens, or data.max_train_tokens=N (the tokens of a pass), "
            "or data.source.streaming=false"
        )
    tokens = sum(schedule.get("tokens") or 0 for schedule in schedules)
    if any(schedule.get("tokens", 0) is None for schedule in schedules):
        device = _device(config)
        if device.type == "cuda":
            raise ValueError(
                "schedule.tokens=null goes by how long the text is, and data.source.streaming=true reads as much as a "
                "run takes: set schedule.tokens, or data.max_train_tokens"
            )
        tokens += cpu_token_budget(called(device)).tokens
    return tokens


def source_of(config: DictConfig, given: Source | None = None) -> Source:
    """Where `data` reads; `given` stands for it. Raises ValueError where that is no text, or of several kinds."""
    data = config.data
    files = {key: data.get(key) for key in ("path", "val_path", "test_path")}
    if given is not None:
        source = given
    elif Mix.takes == getattr(class_of(data.get("source")), "takes", ()):
        source = object_of(data.source, sources=_sources(data.get("sources")))
        if any(files.values()):
            raise ValueError("data.path names the text of one source: in a mix set data.sources.NAME.path")
    else:
        source = object_of(data.source)
    if given is None and files["path"] is not None:
        # a local copy of a known data set keeps that set's way of reading
        # as many documents of it too: budgets are counted in passes over them
        kept = ("fmt", "field", "detokenize", "max_documents")
        reading = {key: getattr(source, key) for key in kept if hasattr(source, key)}
        source = TextFiles(**files, **reading)
    elif given is None and (files["val_path"] or files["test_path"]) and not isinstance(source, TextFiles):
        raise ValueError("data.val_path and data.test_path belong to a local copy: set data.path=FILE too")
    loss = _chat_loss(config)
    if loss is not None:
        source = mapped(source, partial(as_chats, loss=loss))
    elif any(getattr(each, "chat", False) for each in sources_of(source).values()):
        raise ValueError(
            "texts are chats, and data.chat.loss=null would learn them as JSON: set it to assistant or all"
        )
    return source


def _chat_loss(config: DictConfig) -> str | None:
    chat = config.data.get("chat")
    return None if chat is None else chat.get("loss")


def _sources(entries: DictConfig | None) -> dict[str, tuple[Source, float]]:
    """The sources of a mix with their weights, as `data.sources` describes them."""
    found: dict[str, tuple[Source, float]] = {}
    for name, entry in plain(entries or {}).items():
        weight = entry.pop("weight", 1.0)
        try:
            found[name] = (object_of(OmegaConf.create(entry)), weight)
        except ValueError as error:
            raise named(error, name) from error
    return found


def _batch_of(config: DictConfig) -> int:
    """Windows per micro-batch where nobody says: small budgets are short of updates more than of tokens."""
    step = config.data.seq_len * (config.trainer.get("accumulate_grad_batches") or 1)
    tokens = config.schedule.get("tokens", 0)
    if config.schedule.get("epochs"):
        tokens = 0  # as much as there is text: many steps
    elif tokens is None and _device(config).type != "cuda":
        tokens = ON_CPU
    tokens = tokens or BATCH * _LEAST_STEPS * step  # where nothing is trained, nothing is short, nor is it on a GPU
    return max(1, min(BATCH, tokens // (_LEAST_STEPS * step)))


def _default_tokens(config: DictConfig, text_tokens: Callable[[], int]) -> str:
    """Put the machine's own number of tokens into a config that names none, and return what the plan says of it.

    It becomes part of the run's config: a run that is continued elsewhere keeps it.

    Args:
        config: of the run, with values as meant.
        text_tokens: counts those of the training text, where that matters.
    """
    schedules = [step.schedule for step in config.schedule.get("steps") or ()] or [config.schedule]
    unsaid = [schedule for schedule in schedules if schedule.get("tokens", 0) is None]
    for schedule in unsaid:
        if schedule.get("epochs"):
            schedule.tokens = ON_CPU  # the default of the code, which passes over the text take the place of
    unsaid = [schedule for schedule in unsaid if schedule.tokens is None]
    if not unsaid:
        return ""
    device = _device(config)
    chosen = (
        gpu_token_budget(called(device), text_tokens()) if device.type == "cuda" else cpu_token_budget(called(device))
    )
    for number, schedule in enumerate(unsaid):
        schedule.tokens = chosen.tokens // len(unsaid) + (number < chosen.tokens % len(unsaid))
    return chosen.told


def _device(config: DictConfig) -> torch.device:
    """Where the run trains; what Lightning says of an accelerator that there is not, it says itself."""
    return device_of("cpu" if config.trainer.get("accelerator") == "cpu" else "auto")


def importance_of(config: DictConfig) -> Any:
    """The importance, with what its class takes beside its keys."""
    takes = getattr(class_of(config.importance), "takes", ())
    values: dict[str, Any] = {"bos": config.data.get("bos"), "seed": config.seed}
    if "convert" in takes:
        # scores of a teacher alone are asked for without a word about what is done to layers
        values["convert"] = _edit(config) if class_of(config.edit) is ConvertTo else ConvertTo(spec(config.mixer))
    return object_of(config.importance, **{name: values[name] for name in takes})

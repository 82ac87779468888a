"""The objects of a run from its configuration, and the plan of one whose model or text cannot be had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from iskd.commands.build.at_the_end import cache_of, evaluation_of, export_of
from iskd.commands.build.folder import NEEDED, claim, save_config
from iskd.commands.build.model import student_of, teacher_of
from iskd.commands.build.schedule import importance_of, read_with, schedule_of
from iskd.commands.build.text import text_data
from iskd.commands.build.tokens import batch_of, default_tokens
from iskd.commands.build.within_budget import within_budget
from iskd.commands.values import as_meant, class_of, object_of, plain, terms
from iskd.data import Source
from iskd.export import CODES
from iskd.importance import AttentionImportance
from iskd.models import Stack
from iskd.plan.failure import told_in
from iskd.plan.options import RunOptions
from iskd.plan.run_files import CONFIG_FILE, FAILURE_FILE, LOCK_FILE
from iskd.plan.token_budget import ON_GPU
from iskd.schedules import ConvertTo
from iskd.schedules.mixed import parts_of
from iskd.system import Busy, global_rank, run_lock
from iskd.system.faults import UnavailableError
from iskd.system.text import one_of, perhaps
from iskd.teacher import Loaded, TeacherSpec
from iskd.teacher.load import build_config
from iskd.training import Parts
from iskd.training.metrics import loggers_of
from iskd.training.profile.plan_ahead import Ahead, chained, first_sentence, plan_ahead
from iskd.training.state.resuming import student_weights


def parts(config: DictConfig, run_dir: Path, *, teacher: Loaded | None = None, source: Source | None = None) -> Parts:
    """All objects of a run, and the resolved config beside its results.

    `teacher` and `source` stand for what `model` and `data` name, where a caller has them in memory.

    Raises:
        ValueError: a value that its part refuses, or a folder that is not this run's. What is raised once the folder
            is claimed stands in its failure.json.
    """
    config = as_meant(config)  # before the folder is claimed
    resuming = config.resume is not None
    if lost := [key for key in NEEDED if key not in config]:
        if not resuming:
            raise ValueError(f"{lost[0]}=[] chooses nothing, and without it there is no run: choose one, or drop that")
        where = run_dir / CONFIG_FILE
        raise ValueError(f"{where} has no {', '.join(lost)}, without which there is no run: restore it from a copy")
    try:
        claim(run_dir, resuming)
        with told_in(run_dir):
            made = _made(config, run_dir, teacher, source, student_weights(run_dir) if resuming else [])
            if not resuming and global_rank() == 0:
                save_config(config, run_dir)
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
    start, record = student_of(described, config.get("reference")), None
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
    sizes = {"batch": values.get("batch_size") or batch_of(config), "tokens": values["seq_len"]}
    text = str(values.get("path") or source.get("name") or source.get("_target_", "text").rpartition(".")[2])
    told = default_tokens(config, lambda: ON_GPU)
    ahead = Ahead(
        config=model,
        record=record,
        every=(config.get("eval") or {}).get("every"),
        schedule=schedule_of(config, scored=False),
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
    data = text_data(config, teacher.tokenizer, stack, source, start)
    told = default_tokens(config, lambda: len(data.windows("train")) * data.seq_len)
    schedule = schedule_of(within_budget(config, teacher, data, run_dir, start) if config.get("budget") else config)
    losses = terms(plain(config.loss))
    refits = [object_of(config.refit[name]) for name in config.get("refit") or ()]
    asked_export = export_of(plain(config.export))
    chosen_by = [importance, *(step.importance for step in parts_of(schedule))]
    read_with(teacher.tokenizer, chosen_by, data.bos)
    try:
        asked = evaluation_of(config, teacher, chosen_by, data, start)
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
        teacher_cache=cache_of(config, losses),
        tokens_told=told,
        start=start,
    )


def _options(config: DictConfig) -> RunOptions:
    """The keys of `run`. Raises ValueError for one that is none."""
    values, known = plain(config.run), [field.name for field in fields(RunOptions) if field.name != "plan_only"]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"run has no key {unknown[0]!r}{perhaps(unknown[0], known)}: {one_of(known)}")
    return RunOptions(**values, plan_only=config.plan_only)

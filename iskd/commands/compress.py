"""`iskd.compress`: a run from Python, for notebooks and scripts, with the configuration and the objects of `train.py`.

Nothing here reads the command line, changes the working directory or keeps a signal handler; any thread will do. What
stays is the way in which the process keeps freed memory (`iskd.system.allocator`; `ISKD_ALLOCATOR=stock` leaves it
alone).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.commands.arguments import named_model
from iskd.commands.compose import parts
from iskd.commands.values.paths import assigned
from iskd.data import Source, given_texts
from iskd.system.allocator import tune
from iskd.system.files import expanded
from iskd.system.version import options
from iskd.teacher import Loaded
from iskd.teacher.given import given_teacher, lent
from iskd.training import Result, run

__all__ = ["Result", "compress"]

# what config.yaml says in the place of a path; `train.py resume=` then stops with an error that shows it
_MODEL = "the model given to iskd.compress"
_TEXTS = "the texts given to iskd.compress"


def compress(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Iterable[str | Mapping[str, Any]] | str | Path = "docstrings",
    *,
    experiment: str | None = None,
    schedule: str | None = None,
    edit: str | None = None,
    block: str | None = None,
    mixer: str | None = None,
    importance: str | None = None,
    refit: str | Sequence[str] | None = None,
    loss: str | Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    export: bool = True,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
) -> Result:
    """Compress a model while it trains, as `python train.py` does, and return the student.

        result = iskd.compress(model, tokenizer, texts, schedule="iterative", tokens=2_000_000)
        result.final.retention, result.student, result.report

    Where an argument is None, `experiment` decides, and without one `conf/config.yaml`: `schedule=iterative`,
    `edit=replace`, `block=slim`, `importance=bi_veto`, `loss=kl`.

    Args:
        model: the teacher: a model in memory, a directory, the name of a model config (`smollm2`, `gpt2`, ...) or of a
            model on the hub (`OWNER/NAME`). A model in memory is only read: it gets back its modes, gradient flags and
            device.
        tokenizer: of a model in memory; a model by name comes with its own.
        texts: what to train, choose and measure on: one document per string, or one conversation per row of `messages`
            or of `prompt` and `completion` (as `data=chat`); or a file, a folder or a glob (.txt, .jsonl, .parquet); or
            the name of a data config (`docstrings`, `wikitext2`, ...). Documents go to training,
            validation and calibration by the hash of their text, 92, 4 and 4 % of them: a hundred or more are needed.
        experiment: a preset of conf/experiment, e.g. `ild` or `subquadratic`.
        schedule: `iterative`, `oneshot`, `align`, `mixed` (with `schedule.steps` among the overrides) or `none`.
        edit: `replace`, `remove`, `merge` or `convert`.
        block: what `replace` puts in, e.g. `slim`.
        mixer: what `convert` puts in, e.g. `gated_deltanet`.
        importance: which layers go first, e.g. `bi_veto`.
        refit: what is done to the surviving blocks right after every edit, e.g. `output`, or several in order.
        loss: one loss or several, e.g. `["ce", "kl"]`.
        tokens: training tokens of the whole run, `schedule.tokens`.
        seed: of the order of training and of fresh weights.
        export: write the student as a model directory, reopened in a fresh process before it counts.
        run_dir: where everything is written; None makes a new folder below runs/.
        resume: continue the run in `run_dir`. Model, texts and settings have to be those of its start.
        overrides: any other key, as on the command line: `["schedule.count=6", "data.seq_len=256", "logger=wandb"]`.

    Returns:
        The run's result: `student` (float32, in memory), `stages` (a row of measurements each; `final` is the last kept
        one), `record` (the edits), `run_dir`, `model_dir` (None without export) and `report` (an html file).

    Raises:
        ValueError: an argument names nothing, model and tokenizer do not belong together, or a part refuses its values.
        RunError, OSError: as `iskd.training.runner.run`.
    """
    groups = {"experiment": experiment, "schedule": schedule, "edit": edit, "block": block, "mixer": mixer}
    asked = [f"{group}={name}" for group, name in (groups | {"importance": importance}).items() if name is not None]
    for group, names in (("refit", refit), ("loss", loss)):
        if names is not None:
            asked.append(f"{group}=[{names if isinstance(names, str) else ','.join(names)}]")
    numbers = {"schedule.tokens": tokens, "seed": seed}
    asked += [f"{key}={value}" for key, value in numbers.items() if value is not None]
    asked.append(f"export={str(export).lower()}")
    if resume and run_dir is None:
        raise ValueError("resume=True continues the run in run_dir: pass run_dir too")
    tune()
    teacher, model_keys = _teacher(model, tokenizer)
    source, data_keys = _source(texts)
    guard: AbstractContextManager[None] = nullcontext() if isinstance(model, str | Path) else lent(model)
    with guard, _without_lightnings_notes():
        built = parts(
            [*asked, *model_keys, *data_keys, *overrides],
            None if run_dir is None else Path(expanded(run_dir)),
            teacher=teacher,
            source=source,
            resume=resume,
        )
        return run(built)


def _teacher(
    model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Loaded | None, list[str]]:
    """A teacher in memory with what the config says of it, or none and the keys that name it."""
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ValueError(
                f"model={str(model)!r} comes with its own tokenizer: leave tokenizer out, or load the model first and "
                "pass both"
            )
        return None, _named_model(str(model))
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers model, a directory or a name, got {type(model).__name__}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"a model in memory needs its tokenizer, got {type(tokenizer).__name__}: pass tokenizer=")
    return given_teacher(model, tokenizer), ["model=local", assigned("model.path", _MODEL)]


def _named_model(name: str) -> list[str]:
    found = named_model(name)
    if not found:
        known = ", ".join(options("model"))
        raise ValueError(f"model={name!r} is no directory, no model config ({known}) and no name on the hub")
    return found


def _source(texts: Iterable[str | Mapping[str, Any]] | str | Path) -> tuple[Source | None, list[str]]:
    """Documents in memory with what the config says of them, or none and the keys that name them."""
    if not isinstance(texts, Iterable | Path):
        raise ValueError(f"texts must be a list of strings, a path or a name, got {texts!r:.80}")
    if not isinstance(texts, str | Path):
        given = given_texts(texts)
        return given, [f"data={'chat' if given.chat else 'text'}", assigned("data.path", _TEXTS)]
    name = str(texts)
    if name in options("data"):
        return None, [f"data={name}"]
    if not os.path.exists(expanded(name)) and not any(mark in name for mark in "*?["):
        known = ", ".join(options("data"))
        raise ValueError(
            f"texts={name[:80]!r} is no file, folder or glob and no data config ({known}); for a text itself pass a "
            "list: texts=[text]"
        )
    return None, ["data=text", assigned("data.path", expanded(name))]


@contextmanager
def _without_lightnings_notes() -> Iterator[None]:
    """Lightning's start-up notes say nothing about a compression run; its warnings stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)

"""Tasks of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.12608602): the one file that imports lm_eval.

With a data folder the tasks are those of `harness_tasks/*.yaml` over local files, without one the harness's own over
the hub. Of either a seeded random subset is drawn (the harness's own limit takes the first items, and in BLiMP and MMLU
these are of one kind), and scores are kept by item, so that two models can be compared on the same items.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import io
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing, framing_of
from iskd.evaluation.likelihood import Step, TaskResult
from iskd.evaluation.scores import CHOICE, GENERATION, Scored
from iskd.evaluation.tasks import COPY, TASKS, check_task, read_task, subset
from iskd.evaluation.tasks.harness_metrics import USUAL, check_metric, higher_is_better, values_of
from iskd.models import Stack, scoring
from iskd.system import file_sha256
from iskd.system.faults import UnavailableError
from iskd.system.files import expanded, scratch
from iskd.system.patches import before_scoring

log = logging.getLogger(__name__)

TASK_FILES = Path(__file__).parent / "harness_tasks"
# what the harness calls a task, where its name for it is another
HUB_NAMES = {"lambada": "lambada_openai", "winograd_wsc": "wsc273"}
# tasks that are reported by the likelihood per character, as is usual for them; all others by plain accuracy
PER_CHARACTER = frozenset({"hellaswag", "arc_challenge", "openbookqa"})
_LEAST_LONG = 4096  # tokens of a task that is made to a length, where no longer ones are asked for
_FEWSHOT_SEED = 1234  # the harness's own
_ANY_LENGTH = 1 << 20  # tokens; the harness would take "none" for the context that a config tells
_INSTALL = "pip install 'iskd[eval]'"


@dataclass(frozen=True, eq=False)
class Drawn:
    """A task and the items drawn of it.

    Attributes:
        name: as asked for.
        leaves: the harness's task objects by their names; several where the name is that of a group.
        rows: by leaf, which of its items, ascending.
        ids: the items' names, in the order of leaves and rows.
        source: hash of the local file, or the data sets on the hub.
        metric: the one that was asked for; None = the usual one of the task.
    """

    name: str
    leaves: Mapping[str, Any]
    rows: Mapping[str, Sequence[int]]
    ids: tuple[str, ...]
    source: str
    metric: str | None = None


def draw(
    names: Sequence[str],
    *,
    data_dir: str | Path | None,
    limit: int | None,
    seed: int,
    exclude: Collection[str] = (),
    task_dir: str | Path | None = None,
    fewshot: int | None = None,
    metrics: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    lengths: Sequence[int] = (),
) -> Iterator[Drawn]:
    """Read tasks and draw their items, one task after the other.

    Args:
        names: keys of `iskd.evaluation.tasks.task_items.TASKS`; without a data_dir also any other name that the harness
            knows.
        data_dir: folder of NAME/eval.jsonl; None = from the hub.
        limit: at most so many items of each; a larger draw contains a smaller one. None = all.
        seed: of the draw.
        exclude: `Item.sha256` of items to leave out, those that layers were selected by; needs a data_dir.
        task_dir: folder of tasks in the harness's own format, for names that are none of ours.
        fewshot: examples before every question; None = as many as the task says.
        metrics: the metric to compare, by task; others are compared by their usual one.
        tokenizer: for tasks that are made to a length in tokens (RULER's).
        lengths: which lengths these have.

    Raises:
        ValueError: an unknown task, items that cannot be had, or no lm_eval. The message names the fix.
    """
    if data_dir is not None:
        for name in names:
            if task_dir is None:
                check_task(name)
    elif exclude:
        raise ValueError(
            f"layers were selected by {len(exclude)} items of local files, which cannot be told among the hub's: set "
            "eval.data_dir to the folder of these files, and they are left out"
        )
    if data_dir is None:
        log.info("reading lm_eval's index of tasks, which takes some seconds")
    with scratch("iskd-tokenizer") as folder:
        options: dict[str, Any] = {"include_defaults": data_dir is None}
        if task_dir is not None:
            options["include_path"] = expanded(task_dir)
        if tokenizer is not None:  # tasks that are made for it load it by name
            tokenizer.save_pretrained(folder)
            long = [length for length in lengths if length >= _LEAST_LONG] or [_LEAST_LONG]
            options["metadata"] = {"tokenizer": str(folder), "max_seq_lengths": long}
        with _quiet():
            manager = _task_manager()(**options)
        for name in names:
            if data_dir is not None and name in TASKS:
                drawn = _from_file(manager, name, Path(expanded(data_dir)), limit, seed, frozenset(exclude), fewshot)
            else:
                drawn = _from_hub(manager, name, limit, seed)
            if fewshot is not None:
                _with_examples(drawn, fewshot)
            asked = (metrics or {}).get(name)
            check_metric(name, asked, drawn.leaves)
            yield replace(drawn, metric=asked)


def _with_examples(drawn: Drawn, fewshot: int) -> None:
    """Have every question come after so many examples. Raises ValueError where a task has not so many."""
    for leaf, task in drawn.leaves.items():
        task.set_config(key="num_fewshot", value=fewshot)
        docs = [] if not fewshot else list(task.fewshot_docs() or ())
        if len(docs) < fewshot + 1 and fewshot:
            raise ValueError(
                f"eval.fewshot={fewshot}: task {leaf!r} has {len(docs)} examples to show, one of which may be the "
                f"question itself; put more into fewshot.jsonl beside its eval.jsonl, or ask for fewer"
            )


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drawn: Drawn,
    *,
    batch_size: int,
    step: Step,
    frame: Framing | None = None,
) -> Scored:
    """Scores of a model by item, under the caller's autocast; model and tokenizer are left as they were.

    Args:
        model: read through the harness's own adapter for transformers.
        tokenizer: the model's.
        drawn: what to ask.
        batch_size: texts at a time.
        step: told how many of the task's texts are done.
        frame: how the model's texts are framed; None = as the tokenizer does.

    Raises:
        ValueError: a continuation that does not fit into the model's context, a model that gives nan, or a task whose
            metrics are no numbers item by item.
    """
    from lm_eval.evaluator import evaluate

    cut: list[int] = []
    with scoring(model), _quiet():
        lm = _adapter(model, tokenizer, batch_size, drawn, step, cut, frame)
        for task in drawn.leaves.values():
            task.set_fewshot_seed(_FEWSHOT_SEED)
        found = evaluate(
            lm=lm,
            task_dict={"tasks": dict(drawn.leaves)},
            samples=dict(drawn.rows),
            bootstrap_iters=0,
            log_samples=True,
        )
    if lost := sum(cut):
        log.warning("%s: %d texts lost their beginning: the context is %d tokens", drawn.name, lost, lm.max_length)
    logged = found["samples"]
    return _scored(drawn, [(leaf, sample) for leaf in drawn.leaves for sample in _first_filter(logged[leaf])])


def _task_manager() -> Any:
    try:
        from lm_eval.evaluator import evaluate  # noqa: F401
        from lm_eval.models.huggingface import HFLM  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"tasks are scored by lm-evaluation-harness, which is not installed ({error}): {_INSTALL}"
        ) from error
    return TaskManager


def _from_file(
    manager: Any,
    name: str,
    data_dir: Path,
    limit: int | None,
    seed: int,
    exclude: frozenset[str],
    fewshot: int | None = None,
) -> Drawn:
    """A task of ours over DATA_DIR/NAME/eval.jsonl; which items are drawn depends on their texts alone."""
    items = read_task(name, data_dir)
    free = [item for item in items if item.sha256 not in exclude]
    if not free:
        raise ValueError(f"task {name!r}: layers were selected by all {len(items)} items; there is none to report on")
    chosen = {item.id for item in (free if limit is None else subset(free, limit, seed))}
    file = data_dir / name / "eval.jsonl"
    config: dict[str, Any] = yaml.safe_load((TASK_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    with scratch("iskd-tasks") as cache, _quiet():
        # in memory, as the converted copy goes with the folder
        files = {"test": str(file)}
        if fewshot:
            shown = data_dir / name / "fewshot.jsonl"
            files["train"] = str(shown if shown.is_file() else file)
            config |= {"training_split": "train", "fewshot_split": "train"}
        config["dataset_kwargs"] = {"data_files": files, "cache_dir": str(cache), "keep_in_memory": True}
        try:
            leaves = manager.load([config])["tasks"]
        except Exception as error:
            raise ValueError(
                f"{file} cannot be read by the harness ({error!s:.300}): give all its lines the "
                "same fields, each of one kind"
            ) from error
    ((leaf, task),) = leaves.items()
    if len(task.eval_docs) != len(items):
        raise ValueError(f"{file}: the harness reads {len(task.eval_docs)} items in {len(items)} lines")
    rows = {leaf: [row for row, item in enumerate(items) if item.id in chosen]}
    return Drawn(name, leaves, rows, tuple(items[row].id for row in rows[leaf]), f"sha256 {file_sha256(file)}")


def _from_hub(manager: Any, name: str, limit: int | None, seed: int) -> Drawn:
    """A task, group or tag of the harness; of a group the items are drawn over all its tasks."""
    hub_name: Any = HUB_NAMES.get(name, name)
    if hub_name not in manager.all_tasks and name != "cbt":
        if name in TASKS:
            raise ValueError(f"lm_eval has no task {name!r}. {_put(name)}")
        close = difflib.get_close_matches(name, [*TASKS, COPY, *manager.all_tasks], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"unknown task {name!r}: {hint}lm_eval knows {len(manager.all_tasks)}; ours are {', '.join(TASKS)}"
        )
    if name == "cbt":  # the harness has none; ours over the hub's rows, which have the same fields
        config: dict[str, Any] = yaml.safe_load((TASK_FILES / "cbt.yaml").read_text(encoding="utf-8"))
        hub_name = {**config, "dataset_path": "cam-cst/cbt", "dataset_name": "CN", "dataset_kwargs": {}}
    try:
        with _quiet():
            leaves = manager.load([hub_name])["tasks"]
            everything = [(leaf, row) for leaf, task in leaves.items() for row in range(len(task.eval_docs))]
    except Exception as error:
        kind = ValueError if isinstance(error, ImportError) else UnavailableError
        raise kind(_unreachable(name, error)) from error
    drawn = set(everything if limit is None else sorted(everything, key=lambda place: _hash(seed, place))[:limit])
    rows = {leaf: [row for one, row in everything if one == leaf and (one, row) in drawn] for leaf in leaves}
    # the harness takes an empty list for no list
    rows = {leaf: some for leaf, some in rows.items() if some}
    ids = tuple(f"{leaf}-{row}" for leaf, some in rows.items() for row in some)
    sources = sorted({f"{leaves[leaf].DATASET_PATH} {leaves[leaf].VERSION}" for leaf in rows})
    return Drawn(name, {leaf: leaves[leaf] for leaf in rows}, rows, ids, ", ".join(sources))


def _unreachable(name: str, error: Exception) -> str:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(error, ImportError):
        return f"task {name!r} needs a package that is missing ({first:.300}): pip install 'lm_eval[{_extra(name)}]'"
    if name not in TASKS:
        return f"the data of task {name!r} is neither on this machine nor did the hub give it ({first:.300})"
    return (
        f"the data of task {name!r} is neither on this machine nor did the hub give it ({first:.300}). "
        f"Offline: {_put(name)}"
    )


def _extra(name: str) -> str:
    """The extra of lm_eval that a task's packages come with, by what its own errors name most."""
    return "ruler" if name.startswith(("niah", "ruler")) else "tasks"


def _put(name: str) -> str:
    """Where the items of a task of ours go."""
    return (
        f"Put its items ({TASKS[name].hub} on the hub) into DIR/{name}/eval.jsonl, one JSON object a line with the "
        f"fields id, {TASKS[name].fields}, and set eval.data_dir=DIR"
    )


def _hash(seed: int, place: tuple[str, int]) -> str:
    return hashlib.sha256(f"{seed}\n{place[0]}\n{place[1]}".encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's bars, advice and warnings off the terminal; errors come through."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    drawn: Drawn,
    step: Step,
    cut: list[int],
    frame: Framing | None,
) -> Any:
    """The harness's adapter, which counts what is done and refuses what it would silently get wrong."""
    from lm_eval.models.huggingface import HFLM

    device = model.device.type
    mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    lm: Any = HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # it may get a padding token
        backend="causal",
        trust_remote_code=False,
        batch_size=batch_size,
        max_length=Stack(model).limit or _ANY_LENGTH,  # without an attention a model has no length of its own
        mixed_precision_dtype=mixed,
        add_bos_token=_adds_bos(tokenizer, frame),
    )
    before_scoring(lm, lambda requests: cut.append(_too_long(drawn.name, requests, lm.max_length)))
    lm.cache_hook = _Count(drawn, step)
    return lm


def _adds_bos(tokenizer: PreTrainedTokenizerBase, frame: Framing | None) -> bool | None:
    """The harness's `add_bos_token`; None = it does what the tokenizer does.

    Raises:
        ValueError: texts are to begin as this tokenizer does not let them begin, and the harness has no way to.
    """
    own = framing_of(tokenizer).front
    if frame is None or frame.front == own:
        return None
    if frame.front:
        raise ValueError(
            "data.bos asks for a begin token that the tokenizer does not add by itself, and lm-evaluation-harness adds "
            "none of its own: set data.bos=null or none, or give the tokenizer the template (add_bos_token)"
        )
    return False


def _too_long(name: str, requests: Sequence[Any], context: int) -> int:
    """How many requests, (texts, context ids, continuation ids) each, lose their beginning."""
    for (_, continuation), _, ids in requests:
        if not 1 <= len(ids) <= context:
            raise ValueError(
                f"{name}: the continuation {continuation!r:.100} has {len(ids)} tokens of its own; between 1 and "
                f"{context} (the model's context) can be scored"
            )
    return sum(len(before) + len(ids) > context + 1 for _, before, ids in requests)


class _Count:
    """Stands where the harness reports each finished request to its cache."""

    def __init__(self, drawn: Drawn, step: Step) -> None:
        self._drawn, self._step, self._done = drawn, step, 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count one request. Raises ValueError when its log-likelihood is nan, which argmax would take for the best."""
        if attr == "loglikelihood" and math.isnan(res[0]):
            raise ValueError(f"{self._drawn.name}: the model gives nan for {req[1]!r:.100}: its weights are broken")
        self._done += 1
        self._step(self._done, sum(len(task.instances) for task in self._drawn.leaves.values()))


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Tasks that read an answer off a text in several ways log each item once per way."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _scored(drawn: Drawn, samples: Sequence[tuple[str, Mapping[str, Any]]]) -> Scored:
    assert len(samples) == len(drawn.ids)
    values = values_of(drawn.name, samples, drawn.leaves, drawn.metric)
    choice = all(task.OUTPUT_TYPE == "multiple_choice" for task in drawn.leaves.values())
    chance = sum(1 / len(sample["arguments"]) for _, sample in samples) / len(samples) if choice else 0.0
    by_character = drawn.metric is None and drawn.name in PER_CHARACTER and "acc_norm" in values
    main = "acc_norm" if by_character else next(iter(values))
    higher = higher_is_better(main, drawn.leaves)
    chance = chance if main in USUAL else 0.0
    return Scored(CHOICE if choice else GENERATION, main, chance, TaskResult(drawn.ids, values), higher)

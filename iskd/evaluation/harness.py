"""Tasks of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.12608602): the one file that imports lm_eval.

Tasks of ours that a data folder holds are those of `harness_tasks/*.yaml` over local files, all others the harness's
own over the hub. Of either a seeded random subset is drawn (the harness's own limit takes the first items, and in BLiMP
and MMLU these are of one kind), and scores are kept by item, so that two models can be compared on the same items.
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
from iskd.evaluation.judging import TaskResult
from iskd.evaluation.likelihood import Step
from iskd.evaluation.scores import CHOICE, GENERATION, LIKELIHOOD, Scored
from iskd.evaluation.tasks import COPY, TASKS, read_task, subset
from iskd.evaluation.tasks.examples import fewest_examples, keep_apart
from iskd.evaluation.tasks.harness_metrics import USUAL, check_metric, higher_is_better, values_of
from iskd.evaluation.tasks.made_items import COPY_DOC, COPY_PARA, RECALL
from iskd.evaluation.tasks.task_items import CBT_SENTENCE
from iskd.models import Stack, scoring
from iskd.system import file_sha256
from iskd.system.faults import UnavailableError
from iskd.system.files import expanded, scratch
from iskd.system.patches import before_scoring, before_writing

log = logging.getLogger(__name__)

TASK_FILES = Path(__file__).parent / "harness_tasks"
# what the harness calls a task, where its name for it is another
HUB_NAMES = {"lambada": "lambada_openai", "winograd_wsc": "wsc273"}
# tasks that are reported by the likelihood per character, as is usual for them; all others by plain accuracy
PER_CHARACTER = frozenset({"hellaswag", "arc_challenge", "openbookqa"})
_RULER = (4096, 8192)  # tokens of tasks that are made to a length, where none is asked for
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
        names: keys of `iskd.evaluation.tasks.task_items.TASKS`, and any other name that the harness knows.
        data_dir: folder of NAME/eval.jsonl; what has no folder NAME there, and None = from the hub.
        limit: at most so many items of each; a larger draw contains a smaller one. None = all.
        seed: of the draw.
        exclude: `Item.sha256` of items to leave out, those that layers were selected by; in local files alone.
        task_dir: folder of tasks in the harness's own format, for names that are none of ours.
        fewshot: examples before every question; None = as many as the task says.
        metrics: the metric to compare, by task; others are compared by their usual one.
        tokenizer: for tasks that are made to a length in tokens (RULER's).
        lengths: which lengths these have; none = `_RULER`.

    Raises:
        ValueError: an unknown task, items that cannot be had, or no lm_eval. The message names the fix.
    """
    here = None if data_dir is None else Path(expanded(data_dir))
    local = [name for name in names if _is_local(name, here)]
    hub = [name for name in names if name not in local]
    if exclude and (twice := [name for name in hub if data_dir is None or _asks_as(name)]):
        raise ValueError(
            f"layers were selected by {len(exclude)} items of local files, which cannot be told among those of "
            f"{', '.join(twice)} on the hub: set eval.data_dir to the folder of these files, and they are left out"
        )
    if moved := [name for name in hub if here is not None and name in TASKS]:
        log.warning("%s: not in eval.data_dir=%s, so the hub's items are asked", ", ".join(moved), data_dir)
    with scratch("iskd-tokenizer") as folder:
        options: dict[str, Any] = {}
        if task_dir is not None:
            options["include_path"] = expanded(task_dir)
        if tokenizer is not None:  # tasks that are made for it load it by name
            tokenizer.save_pretrained(folder)
            options["metadata"] = {"tokenizer": str(folder), "max_seq_lengths": list(lengths) or list(_RULER)}
        manager = _manager(hub, options)
        for name in names:
            if here is not None and name in local:
                drawn = _from_file(manager, name, here, limit, seed, frozenset(exclude), fewshot)
            else:
                drawn = _from_hub(manager, name, limit, seed, lengths)
            _with_examples(drawn, fewshot, local=name in local or name == "cbt")
            asked = (metrics or {}).get(name)
            check_metric(name, asked, drawn.leaves)
            yield replace(drawn, metric=asked)


def _is_local(name: str, here: Path | None) -> bool:
    """Whether a task of ours is read from local files: where these have a folder for it, or there are none at all."""
    return here is not None and name in TASKS and ((here / name).exists() or not here.is_dir())


def _asks_as(name: str) -> bool:
    """Whether a task of the harness may ask what one of ours asks."""
    known = {*TASKS, *HUB_NAMES.values()}
    return any(name == other or name.startswith((f"{other}_", f"{other}-")) for other in known)


def _manager(names: Sequence[str], options: Mapping[str, Any]) -> Any:
    """The harness's index of tasks; its own among them only if one of the names needs it, as reading it takes long."""
    made = _task_manager()
    with _quiet():
        manager = made(include_defaults=False, **options)
    if all(HUB_NAMES.get(name, name) in manager.all_tasks or name == "cbt" for name in names):
        return manager
    log.info("reading lm_eval's index of tasks, which takes some seconds")
    with _quiet():
        return made(include_defaults=True, **options)


def _with_examples(drawn: Drawn, fewshot: int | None, *, local: bool) -> None:
    """Have every question come after so many examples of others. Raises ValueError where a task has not so many.

    Of the harness's own tasks some take none, as `lm_eval` ignores `--num_fewshot` there too.
    """
    for leaf, task in drawn.leaves.items():
        own = task.config.num_fewshot
        fixed = task.OUTPUT_TYPE == "loglikelihood_rolling" or (own == 0 and not local)
        if fewshot and fixed:
            log.warning("eval.fewshot=%d: task %r takes no examples, it is asked without", fewshot, leaf)
        if fewshot is not None and not fixed:
            task.set_config(key="num_fewshot", value=fewshot)
        count = int(task.config.num_fewshot or 0)
        if not count or task.OUTPUT_TYPE == "loglikelihood_rolling":
            continue
        keep_apart(task)
        docs = task.eval_docs
        found = fewest_examples(task, (docs[row] for row in drawn.rows[leaf]))
        if found < count:
            more = "put more into fewshot.jsonl beside its eval.jsonl, or ask for fewer" if local else "ask for fewer"
            raise ValueError(
                f"eval.fewshot={count}: task {leaf!r} has {found} examples to show beside the question; {more}"
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

    cut, shortened = list[int](), dict[int, int]()
    with scoring(model), _quiet():
        lm = _adapter(model, tokenizer, batch_size, drawn, step, frame)
        before_scoring(lm, lambda requests: cut.append(_too_long(drawn.name, requests, lm.max_length)))
        before_writing(lm, lambda requests: _fitting(lm, requests, cut, shortened))
        for task in drawn.leaves.values():
            task.set_fewshot_seed(_FEWSHOT_SEED)
        found = evaluate(
            lm=lm,
            task_dict={"tasks": dict(drawn.leaves)},
            samples=dict(drawn.rows),
            bootstrap_iters=0,
            log_samples=True,
        )
    for asked, room in shortened.items():
        told = "%s: answers may have %d tokens and not %d: half of the context is the question's"
        log.warning(told, drawn.name, room, asked)
    if lost := sum(cut):
        log.warning("%s: %d texts lost their beginning: the context is %d tokens", drawn.name, lost, lm.max_length)
    return _scored(drawn, {leaf: found["samples"][leaf] for leaf in drawn.leaves}, lost + len(shortened))


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
    free = [item for item in items if not item.among(exclude)]
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
            files |= {"train": str(shown)} if shown.is_file() else {}
            config |= {"training_split": "train"} if shown.is_file() else {}
            config |= {"fewshot_split": "train" if shown.is_file() else "test"}
        config["dataset_kwargs"] = {"data_files": files, "cache_dir": str(cache), "keep_in_memory": True}
        try:
            leaves = manager.load([config])["tasks"]
        except Exception as error:
            raise ValueError(
                f"{file} cannot be read by the harness ({error!s:.300}): give all lines in it and in fewshot.jsonl the "
                "same fields, each of one kind"
            ) from error
    ((leaf, task),) = leaves.items()
    if len(task.eval_docs) != len(items):
        raise ValueError(f"{file}: the harness reads {len(task.eval_docs)} items in {len(items)} lines")
    rows = {leaf: [row for row, item in enumerate(items) if item.id in chosen]}
    return Drawn(name, leaves, rows, tuple(items[row].id for row in rows[leaf]), f"sha256 {file_sha256(file)}")


def _from_hub(manager: Any, name: str, limit: int | None, seed: int, lengths: Sequence[int] = ()) -> Drawn:
    """A task, group or tag of the harness; of a group the items are drawn over all its tasks."""
    hub_name: Any = HUB_NAMES.get(name, name)
    made = [COPY, COPY_DOC, COPY_PARA, RECALL, CBT_SENTENCE]
    if hub_name not in manager.all_tasks and name != "cbt":
        if name in TASKS:
            raise ValueError(f"lm_eval has no task {name!r}. {_put(name)}")
        close = difflib.get_close_matches(name, [*TASKS, *made, *manager.all_tasks], n=1)
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
        raise kind(_unreachable(name, error, lengths)) from error
    drawn = set(everything if limit is None else sorted(everything, key=lambda place: _hash(seed, place))[:limit])
    rows = {leaf: [row for one, row in everything if one == leaf and (one, row) in drawn] for leaf in leaves}
    # the harness takes an empty list for no list
    rows = {leaf: some for leaf, some in rows.items() if some}
    ids = tuple(f"{leaf}-{row}" for leaf, some in rows.items() for row in some)
    sources = sorted({f"{leaves[leaf].DATASET_PATH} {leaves[leaf].VERSION}" for leaf in rows})
    return Drawn(name, {leaf: leaves[leaf] for leaf in rows}, rows, ids, ", ".join(sources))


def _unreachable(name: str, error: Exception, lengths: Sequence[int]) -> str:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    if "max_seq_length" in first:
        told = list(lengths) or list(_RULER)
        return f"task {name!r} cannot be made at eval.lengths={told}: a length is too short for its text and answer"
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
        add_bos_token=adds_bos(tokenizer, frame),
    )
    lm.cache_hook = _Count(drawn, step)
    return lm


def adds_bos(tokenizer: PreTrainedTokenizerBase, frame: Framing | None) -> bool | None:
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
    """How many requests, (texts, context ids, continuation ids) each, lose their beginning.

    Windows of a rolling task have no texts: the harness cuts them to the context, and each token is scored in one.
    """
    for texts, _, ids in requests:
        if texts is not None and not 1 <= len(ids) <= context:
            raise ValueError(
                f"{name}: the continuation {texts[1]!r:.100} has {len(ids)} tokens of its own; between 1 and "
                f"{context} (the model's context) can be scored"
            )
    return sum(len(before) + len(ids) > context + 1 for _, before, ids in requests)


def _fitting(lm: Any, requests: Sequence[Any], cut: list[int], shortened: dict[int, int]) -> list[Any]:
    """Requests whose answers leave half of the context to the prompt, and how many lose its beginning even so."""
    from lm_eval.models.utils import normalize_gen_kwargs

    fitted, lost = [], 0
    for request in requests:
        prompt, options = request.args
        told = normalize_gen_kwargs(options, lm.max_gen_toks)
        asked, most = int(told["max_gen_toks"]), max(1, lm.max_length // 2)
        if asked > most:
            shortened[asked] = most
            request = copy.copy(request)
            request.arguments = (prompt, {**told, "max_gen_toks": most})
        lost += len(lm.tok_encode(prompt)) + min(asked, most) > lm.max_length
        fitted.append(request)
    cut.append(lost)
    return fitted


class _Count:
    """Stands where the harness reports each finished request to its cache."""

    def __init__(self, drawn: Drawn, step: Step) -> None:
        self._drawn, self._step, self._done = drawn, step, 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count one request. Raises ValueError when its log-likelihood is nan, which argmax would take for the best."""
        if attr.startswith("loglikelihood") and math.isnan(res[0] if isinstance(res, tuple) else res):
            raise ValueError(f"{self._drawn.name}: the model gives nan for {req[-1]!r:.100}: its weights are broken")
        self._done += 1
        self._step(self._done, sum(len(task.instances) for task in self._drawn.leaves.values()))


def _scored(drawn: Drawn, samples: Mapping[str, Sequence[Mapping[str, Any]]], cut: int) -> Scored:
    usual = "acc_norm" if drawn.name in PER_CHARACTER else ""
    found = values_of(drawn.name, samples, drawn.leaves, drawn.metric, usual)
    asked = [sample for logged in samples.values() for sample in logged if sample["filter"] == logged[0]["filter"]]
    assert len(asked) == len(drawn.ids)
    types = {str(task.OUTPUT_TYPE) for task in drawn.leaves.values()}
    choice = types == {"multiple_choice"}
    kind = CHOICE if choice else LIKELIHOOD if types == {"loglikelihood_rolling"} else GENERATION
    chance = sum(1 / len(sample["arguments"]) for sample in asked) / len(asked) if choice else 0.0
    chance = chance if found.main.partition(",")[0] in USUAL else 0.0
    result = TaskResult(drawn.ids, found.values, found.wholes, cut)
    return Scored(kind, found.main, chance, result, higher_is_better(found.main, drawn.leaves))

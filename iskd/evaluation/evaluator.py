"""The evaluation of a model: tasks, copying and perplexity, beside its teacher's on the same items."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing, framing_of
from iskd.evaluation.harness import Drawn, adds_bos
from iskd.evaluation.quantize import check as check_quantize
from iskd.evaluation.quantize import quantized
from iskd.evaluation.questions import EvalSpec, Question, Tell, answers, digest_of, is_ours, passages_of, questions
from iskd.evaluation.results import AtPosition, Evaluation, TextScore
from iskd.evaluation.scores import Scored, compare
from iskd.evaluation.tasks.made_items import length_of
from iskd.evaluation.tasks.task_items import COPY
from iskd.evaluation.text import TextLoss, TextWindows, by_position, read_text, text_loss, text_score, text_windows
from iskd.models import Stack, surgery
from iskd.models.tokenizers import check_same_tokenizer
from iskd.system import ProgressLine
from iskd.teacher import Loaded

_log = logging.getLogger(__name__)
_NOTICED, _MOSTLY = 0.02, 0.5  # shares of a report text that a run has seen: told, refused
_PACKAGES = ("lm_eval", "torch", "transformers")
_NOTHING = "there is nothing to evaluate: set eval.tasks=[...] or eval.text=FILE"


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvalSpec,
    teacher: Loaded | None = None,
    *,
    text: str | None = None,
    exclude: Collection[str] = (),
    source: Mapping[str, Any] | None = None,
    frame: Framing | None = None,
    seen: Callable[[Tensor], float] = lambda _ids: 0.0,
) -> Evaluation:
    """Score a model, and its teacher on the same items, where they are and under the caller's autocast.

    Equal models, data, settings and machine give equal results.

    Args:
        model: the student, or any model; left as it was.
        tokenizer: its own.
        spec: what to ask.
        teacher: what to compare with; its tokenizer must be the student's.
        text: scored when the spec names no file, e.g. the test text of the run.
        exclude: `Item.sha256` of items to leave out: those that layers were selected by, from the run's data.json.
        source: where the model came from, as `Loaded.source`; what identifies it goes into the result.
        frame: how the text of both models is framed; None = as the tokenizer does.
        seen: which share of windows of text [W, T] the student has trained or calibrated on.

    Raises:
        ValueError: nothing to evaluate, an unknown task, items or text that cannot be had, lm_eval is not installed,
            models and tokenizers that do not belong together, or most of the text was seen. The message names the fix.
    """
    with ProgressLine() as tell:
        asking = Asking(spec, tokenizer, teacher, text=text, exclude=exclude, frame=frame)
        asking.check_unseen(seen)
        return asking.ask(model, tokenizer, source or {}, tell, spec.quantize)


class Asking:
    """What a spec asks, drawn once: of one student after another, beside the same teacher, who is asked once.

    Text is cut into windows that the longer of student and teacher reads at once, so that a student is asked the same
    along a run, at its end, and by itself; the teacher reads it anew where a student reads further than those before.

    Args:
        spec, teacher, text, exclude, frame: as of `evaluate`.
        tokenizer: the students' own.

    Raises:
        ValueError: as `evaluate`, but for what only the scores of a model can tell.
    """

    def __init__(
        self,
        spec: EvalSpec,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Loaded | None,
        *,
        text: str | None = None,
        exclude: Collection[str] = (),
        frame: Framing | None = None,
    ) -> None:
        if teacher is not None:
            check_same_tokenizer(tokenizer, teacher.tokenizer)
            _check_rows("teacher", teacher.model, teacher.tokenizer)
        self.spec, self.teacher, self.excluded = spec, teacher, len(exclude)
        self.frame = framing_of(tokenizer) if frame is None else frame
        self._tokenizer, self._documents = tokenizer, _documents(spec, text, self.frame)
        self._windows: dict[int, TextWindows] = {}
        self.windows = self._beside(None)
        if not spec.tasks and self.windows is None:
            raise ValueError(_NOTHING)
        check_quantize(spec.quantize, self.windows is not None)
        if not all(map(is_ours, spec.tasks)):
            adds_bos(tokenizer, self.frame)
        self._questions = questions(spec, tokenizer, exclude)
        self._scores: dict[str, Scored] | None = None
        self._losses: dict[int, TextLoss] = {}

    def _beside(self, student: PreTrainedModel | None) -> TextWindows | None:
        """The text as the student or the teacher reads it, whose limit is longer; the other one reads it in pieces."""
        if self._documents is None:
            return None
        models = [*([] if student is None else [student]), *([] if self.teacher is None else [self.teacher.model])]
        longest = self.spec.window
        window = min(longest, max((Stack(model).limit or longest for model in models), default=longest))
        if window not in self._windows:
            options: dict[str, Any] = {"tokens": self.spec.tokens, "window": window, "frame": self.frame}
            self._windows[window] = text_windows(self._documents, self._tokenizer, **options)
        return self._windows[window]

    def check_unseen(self, seen: Callable[[Tensor], float]) -> None:
        """Raise ValueError where most of the text of the spec is what the student learns from; tell of some.

        Of tasks of ours it is told alone: they ask texts that are on every machine, or files of the user's own.
        """
        for name, question in self._questions.items():
            if isinstance(question, Drawn) or name == COPY or length_of(name):  # of the latter two words are drawn
                continue
            passages = passages_of(question, self._tokenizer)
            share = 0.0 if passages is None else seen(passages)
            if share >= _NOTICED:
                told = "%.1f %% of the passages of eval.tasks=[%s] are in what the student trains or calibrates on: "
                _log.warning(told + "its scores flatter the student", 100 * share, name)
        if self.spec.text is None or self.windows is None:
            return
        share = seen(self.windows.ids)
        told = (
            f"{100 * share:.1f} % of the passages of eval.text={self.spec.text} are in what the student trains or "
            "calibrates on"
        )
        if share >= _MOSTLY:
            raise ValueError(f"{told}; report on text that it never sees")
        if share >= _NOTICED:
            _log.warning("%s: scores on it flatter the student", told)

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: Mapping[str, Any],
        tell: Tell = lambda *_: None,
        quantize: Sequence[str] = (),
    ) -> Evaluation:
        """Score a model, where it is and under the caller's autocast.

        Args:
            model: the student, or any model; left as it was.
            tokenizer: its own.
            source: what identifies it.
            tell: told how far it is.
            quantize: also measure it in fewer bits; a copy for each kind, so not of every student along a run.
        """
        _check_rows("student", model, tokenizer)
        spec, seed, resamples = self.spec, self.spec.seed, self.spec.resamples
        windows = self._beside(model)
        mine = answers(model, tokenizer, self._questions, spec, "student", tell, self.frame)
        loss = self._read(model, windows, "student", tell)
        theirs, other = self._teachers(windows, tell)
        draws: dict[str, Any] = {"resamples": resamples, "seed": seed, "beyond": self._beyond()}
        found, retention, mean = compare(mine, theirs, **draws)
        scored_text: TextScore | None = None
        positions: tuple[AtPosition, ...] = ()
        if windows is not None and loss is not None:
            positions = by_position(windows, loss, other)
            scored_text = text_score(windows, loss, other, resamples=resamples, seed=seed)
        named = {"student": _facts(model, source)}
        if self.teacher is not None:
            named["teacher"] = _facts(self.teacher.model, self.teacher.source)
        settings = {**_settings(spec, self._questions, self.excluded, model), "framing": self.frame.to_json()}
        step = partial(tell, "student in fewer bits, windows of text")
        packed = quantized(model, windows, quantize, batch_tokens=spec.batch_tokens, step=step)
        return Evaluation(found, retention, mean, scored_text, named, settings, quantized=packed, positions=positions)

    def _beyond(self) -> list[str]:
        """Tasks of a length that the teacher cannot read."""
        limit = None if self.teacher is None else Stack(self.teacher.model).limit
        return [] if limit is None else [name for name in self._questions if (length_of(name) or 0) > limit]

    def _teachers(self, windows: TextWindows | None, tell: Tell) -> tuple[dict[str, Scored] | None, TextLoss | None]:
        """The teacher's answers: to the tasks, and on these windows."""
        if self.teacher is None:
            return None, None
        model, tokenizer = self.teacher.model, self.teacher.tokenizer
        if self._scores is None:
            self._scores = answers(model, tokenizer, self._questions, self.spec, "teacher", tell, self.frame)
        length = 0 if windows is None else windows.ids.shape[1]
        if length not in self._losses and (loss := self._read(model, windows, "teacher", tell)) is not None:
            self._losses[length] = loss
        return self._scores, self._losses.get(length)

    def _read(self, model: PreTrainedModel, windows: TextWindows | None, who: str, tell: Tell) -> TextLoss | None:
        if windows is None:
            return None
        step = partial(tell, f"{who}, windows of text")
        return text_loss(model, windows, batch_tokens=self.spec.batch_tokens, step=step)


def check(
    spec: EvalSpec,
    teacher: Loaded,
    *,
    exclude: Collection[str] = (),
    frame: Framing | None = None,
    seen: Callable[[Tensor], float] = lambda _ids: 0.0,
) -> None:
    """Find out at the start of a run what would keep `evaluate` from working at its end.

    Tasks are read and their items drawn, from the hub too, which keeps a copy on this machine; text is read and cut.

    Args:
        spec: as of `evaluate`, like the next three.
        teacher: whose tokenizer and context count.
        exclude: items that are not asked.
        frame: how documents are framed.
        seen: which share of windows of text [W, T] the run, or one that its student comes from, learns from.

    Raises:
        ValueError: as `evaluate`, but for what only the scores of a model can tell.
    """
    Asking(spec, teacher.tokenizer, teacher, exclude=exclude, frame=frame).check_unseen(seen)


def _check_rows(who: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows, largest = cast(Tensor, model.get_input_embeddings().weight).shape[0], max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the {who}'s embedding {rows} rows: they do not belong together; "
            "use the tokenizer that came with the weights"
        )


def _documents(spec: EvalSpec, text: str | None, frame: Framing) -> list[str] | None:
    """The text to score, document by document; None where there is none."""
    if spec.text is None:
        return None if text is None else [text]
    documents = read_text(spec.text, spec.tokens)
    if frame.head or frame.tail:
        return documents
    return ["\n\n".join(documents)]  # nothing is said of documents: a file is one text, as it stands there


def _facts(model: PreTrainedModel, source: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a model; of a name that is a folder only its end, as folders are those of one machine."""
    facts = {key: source[key] for key in ("name", "kind", "revision", "seed", "sha256") if key in source}
    if facts.get("kind") not in ("hub", "bundled") and "name" in facts:
        facts["name"] = PurePath(str(facts["name"])).name
    stack = Stack(model)
    sizes = {"layers": len(stack.layers), "params": surgery.parameters(model), "limit": stack.limit}
    return {**facts, "type": str(model.config.model_type), **sizes, "dtype": _dtype(model.dtype)}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settings(
    spec: EvalSpec, asked_of: Mapping[str, Question], excluded: int, model: PreTrainedModel
) -> dict[str, Any]:
    """What was asked for and what computed it, without the paths of one machine."""
    own = ("data_dir", "text", "every", "efficiency_seconds", "quantize")
    asked = {key: value for key, value in asdict(spec).items() if key not in own}
    kind = model.device.type
    mixed = torch.is_autocast_enabled(kind)
    asked["device"] = torch.cuda.get_device_name(model.device) if kind == "cuda" else kind
    asked["precision"] = f"{_dtype(torch.get_autocast_dtype(kind))} autocast" if mixed else _dtype(model.dtype)
    sources = {name: question.source for name, question in asked_of.items() if isinstance(question, Drawn)}
    items = {name: digest for name, question in asked_of.items() if (digest := digest_of(question))}
    versions = {package: _version(package) for package in _PACKAGES}
    drawn = {"excluded": excluded, "data": sources, "items": items}
    return {**asked, "local": spec.data_dir is not None, **drawn, "versions": versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

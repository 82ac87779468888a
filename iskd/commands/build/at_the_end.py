"""What is asked for at a run's end, and of its teacher: export, evaluation, cached answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from iskd.commands.values import object_of, plain
from iskd.data import TextData, framing_of
from iskd.evaluation import EvalSpec, refuse_training_text
from iskd.evaluation.evaluator import check
from iskd.export import CODES, STORED
from iskd.losses import Terms
from iskd.plan.run_files import learned_in, run_of
from iskd.system import global_rank
from iskd.teacher import Loaded, TeacherCacheSpec, check_terms_cached
from iskd.training.facts import selected


def export_of(value: Any) -> dict[str, str] | None:
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


def evaluation_of(
    config: DictConfig, teacher: Loaded, importances: Sequence[object], data: TextData, start: Path | None = None
) -> EvalSpec | None:
    """What the student is asked at the end of the run; that it can be asked is found out now, not after hours."""
    if not config.get("eval"):
        return None
    spec: EvalSpec = object_of(config.eval)
    if spec.efficiency_seconds:
        raise ValueError("eval.efficiency_seconds is of iskd evaluate; for a run set run.efficiency_seconds")
    if not spec.asks and spec.quantize:
        raise ValueError(
            f"eval.quantize={list(spec.quantize)} is measured at the end, where nothing is asked: set eval.tasks=[...] "
            "or eval.text=FILE, or leave it out"
        )
    if not spec.asks and spec.inside:
        return spec
    if not spec.asks:
        raise ValueError(
            "there is nothing to evaluate: set eval.tasks=[...], eval.text=FILE or, to validate inside stages alone, "
            "eval.every=TOKENS"
        )
    if spec.text is not None:
        earlier = learned_in(run_of(start))
        refuse_training_text(spec.text, [data.source.fingerprint(), *(text.content for text in earlier)])
    if global_rank() == 0:
        chosen = [sha for items in selected(*importances, start=start).values() for sha in items]
        check(spec, teacher, exclude=chosen, frame=framing_of(teacher.tokenizer, data.bos), seen=data.seen_share)
    return spec


def cache_of(config: DictConfig, losses: Terms) -> TeacherCacheSpec | None:
    """How the teacher's answers are kept, or None; checked against the losses before anything runs."""
    values: dict[str, Any] = plain(config.get("teacher") or {})
    kind = values.pop("cache", None)
    if kind is None:
        return None
    check_terms_cached(losses, kind)
    return TeacherCacheSpec(kind, **values)

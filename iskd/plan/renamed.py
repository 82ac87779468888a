"""Parts by the names that iskd 0.1 gave them in the configs of its runs."""

from __future__ import annotations

from typing import Any

# To rename a part that some run's config.yaml may name, add a line. Blocks and mixers are named in records too, which
# travel with exports: these keep their names.
RENAMED = {
    "iskd.corpus.Docstrings": "iskd.data.sources.Docstrings",
    "iskd.corpus.HubDataset": "iskd.data.sources.HubDataset",
    "iskd.corpus.TextFiles": "iskd.data.sources.TextFiles",
    "iskd.evaluate.EvalSpec": "iskd.evaluation.evaluator.EvalSpec",
    "iskd.optim.OptimSpec": "iskd.training.step.optimizer.OptimSpec",
    "iskd.schedules.base.ConvertTo": "iskd.schedules.edits.ConvertTo",
    "iskd.schedules.base.RemoveLayers": "iskd.schedules.edits.RemoveLayers",
    "iskd.schedules.base.ReplaceWith": "iskd.schedules.edits.ReplaceWith",
    "iskd.teachers.TeacherSpec": "iskd.teacher.load.TeacherSpec",
}


def now_called(target: Any) -> Any:
    """Today's name of a `_target_`; anything unknown as it is."""
    return RENAMED.get(target, target) if isinstance(target, str) else target


def renamed(values: Any) -> Any:
    """Nested dicts and lists of a saved config, every `_target_` by today's name."""
    if isinstance(values, dict):
        return {key: now_called(item) if key == "_target_" else renamed(item) for key, item in values.items()}
    return [renamed(item) for item in values] if isinstance(values, list) else values

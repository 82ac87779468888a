"""What a run writes down about its stages, and who among them is the teacher, the student, kept.

Every curve of a run is drawn against `X_AXIS`, cumulative training tokens, because stages differ in batch size and a
step is therefore not a unit of cost. `stages.json` holds the list of `StageResult`; the table, the report and the
resumed schedule all read this one file. The few numbers that stand for a whole run are in `iskd.plan.summary`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from iskd.plan.edits import MAX_LAYERS, REMOVAL_OPS
from iskd.plan.metric_names import QUALITY
from iskd.plan.run_files import STAGES_FILE
from iskd.system import read_json, write_whole
from iskd.system.reading import Count, Number, is_integer, read_as

GUESSING = "of guessing among all tokens"
"""In the event of a stage whose student says no more than that would: how it is known again."""
_OPS = ("replace", *REMOVAL_OPS, "convert")


def _from_word(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _edit(edit: dict[str, Any]) -> dict[str, Any]:
    layer = edit.get("layer", -1)
    if edit.get("op") not in _OPS or not is_integer(layer) or not 0 <= layer < MAX_LAYERS:
        raise ValueError(f"must have 'op' in {_OPS} and 'layer', an integer in 0..{MAX_LAYERS - 1}")
    return edit


def check_quality(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers themselves. Raises ValueError unless each is one of `QUALITY`."""
    if set(numbers) - set(QUALITY):
        raise ValueError(f"must have keys among {QUALITY}")
    return numbers


def check_inside(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers themselves. Raises ValueError unless they are `tokens` and some of `QUALITY`."""
    if "tokens" not in numbers or set(numbers) - {"tokens", *QUALITY}:
        raise ValueError(f"must have the key 'tokens' and keys among {QUALITY}")
    return numbers


def _check_intervals(found: dict[str, list[float]]) -> dict[str, list[float]]:
    if set(found) - set(QUALITY) or any(len(bounds) != 2 for bounds in found.values()):
        raise ValueError(f"must have keys among {QUALITY}, each with two bounds")
    return found


def _layers(numbers: dict[str, float]) -> dict[str, float]:
    if not all(key.isascii() and key.isdecimal() and len(key) < 5 for key in numbers):
        raise ValueError("must have layers as keys ('0', '1', ...)")
    return numbers


Metric = Annotated[Number, BeforeValidator(_from_word)]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What one stage did and what was measured at its end.

    Attributes:
        index: 0 is the teacher before any edit, then 1..n in the order the stages ran.
        name: Short words for people, e.g. "replace 14".
        edits: Edits as in the record, each with at least `op` and `layer`.
        params: All parameters of the student at the stage's end.
        block_params: Parameters of the layers' blocks (no embeddings, head or final norm).
        ppl: Perplexity on the validation text.
        kl: KL from teacher to student, nats per token.
        top1: Share of positions where both prefer the same token, 0 to 1.
        retention: Student's score / teacher's score on the same items.
        before: The `QUALITY` numbers right after the edit, before healing.
        intervals: Least and most of each `QUALITY` number at the stage's end, 95 %, over windows of the text.
        tokens: Cumulative training tokens at the stage's end.
        seconds: Wall time of the stage.
        train_tokens_per_s: Training speed.
        tokens_per_s: Scoring speed on the validation text.
        inside: What was measured inside the stage: `tokens` so far and the `QUALITY` numbers, in order.
        evaluation: Tasks and text at the stage's end beside the teacher, as in evaluation.json; None = not asked.
        scores: Importance by layer (key: the layer as text), higher = keep.
        status: "rolled_back" when the stage missed the quality floor and its edits were undone.
        events: Sentences worth telling, in order.
    """

    index: Count
    name: str
    edits: list[Annotated[dict[str, Any], AfterValidator(_edit)]] = field(default_factory=list)
    params: Count
    block_params: Count
    ppl: Metric
    kl: Metric
    top1: Metric
    retention: Metric
    before: Annotated[dict[str, Metric], AfterValidator(check_quality)] | None = None
    intervals: Annotated[dict[str, list[Metric]], AfterValidator(_check_intervals)] | None = None
    tokens: Count
    seconds: Metric
    train_tokens_per_s: Metric | None = None
    tokens_per_s: Metric | None = None
    inside: list[Annotated[dict[str, Metric], AfterValidator(check_inside)]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    scores: Annotated[dict[str, Metric], AfterValidator(_layers)] | None = None
    status: Literal["kept", "rolled_back"] = "kept"
    events: list[str] = field(default_factory=list)

    @property
    def guesses(self) -> bool:
        """Whether the student said no more than a guess among all tokens would, as an event tells."""
        return any(GUESSING in event for event in self.events)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; non-finite floats become the strings "Infinity", "-Infinity", "NaN" (strict JSON)."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Any) -> StageResult:
        """Inverse of `to_json`.

        Raises:
            ValueError: A key is unknown or missing, or a value has the wrong type.
        """
        return read_as(cls, data, f"stage {data.get('index', '?')!r:.20}" if isinstance(data, Mapping) else "a stage")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write_stages(run_dir: Path, results: Sequence[StageResult]) -> Path:
    """Write `stages.json` in `run_dir` atomically: a reader, or a killed run, sees the old list or the new one.

    Returns:
        The file's path.
    """
    text = json.dumps([r.to_json() for r in results], indent=1, allow_nan=False) + "\n"
    return write_whole(Path(run_dir) / STAGES_FILE, text)


def read_stages(run_dir: Path) -> list[StageResult]:
    """Read `stages.json` of `run_dir`, in stage order.

    Raises:
        FileNotFoundError: The run has no `stages.json`.
        ValueError: The file is not a JSON list of stage results, or two stages share an index.
    """
    path = Path(run_dir) / STAGES_FILE
    data = read_json(path)
    if not isinstance(data, list):
        raise ValueError(f"{path} must hold a list of stages, got {type(data).__name__}")
    try:
        results = [StageResult.from_json(item) for item in data]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    indices = [result.index for result in results]
    if len(set(indices)) != len(indices):
        raise ValueError(f"{path}: stage indices must differ, got {indices!r:.200}")
    return sorted(results, key=lambda result: result.index)


def teacher_of(results: Sequence[StageResult]) -> StageResult | None:
    """The teacher's row (index 0), or None when the list lacks it."""
    return next((result for result in results if result.index == 0), None)


def student_of(results: Sequence[StageResult]) -> StageResult | None:
    """The student as the run left it: the last stage that was kept."""
    return next((result for result in reversed(results) if result.status == "kept"), None)


def kept_of(results: Sequence[StageResult]) -> list[StageResult]:
    """The stages that were kept, the teacher's row among them."""
    return [result for result in results if result.status == "kept"]


def rolled_back_of(results: Sequence[StageResult]) -> list[StageResult]:
    """The stages whose edits were undone."""
    return [result for result in results if result.status == "rolled_back"]

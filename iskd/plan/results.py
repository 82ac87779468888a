"""What a run writes down about itself: the names of its metrics and one result per stage.

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
from typing import Any, Literal, cast

from iskd.plan.metric_names import QUALITY
from iskd.plan.reading import MAX_LAYERS
from iskd.plan.run_folder import STAGES_FILE
from iskd.system import read_json, write_whole
from iskd.system.files import MAX_NUMBER

_OPS = ("replace", "remove", "convert")
_STATUSES = ("kept", "rolled_back")


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
        tokens: Cumulative training tokens at the stage's end.
        seconds: Wall time of the stage.
        train_tokens_per_s: Training speed.
        tokens_per_s: Scoring speed on the validation text.
        scores: Importance by layer (key: the layer as text), higher = keep.
        status: "rolled_back" when the stage missed the quality floor and its edits were undone.
        events: Sentences worth telling, in order.
    """

    index: int
    name: str
    edits: list[dict[str, Any]] = field(default_factory=list)
    params: int
    block_params: int
    ppl: float
    kl: float
    top1: float
    retention: float
    before: dict[str, float] | None = None
    tokens: int
    seconds: float
    train_tokens_per_s: float | None = None
    tokens_per_s: float | None = None
    scores: dict[str, float] | None = None
    status: Literal["kept", "rolled_back"] = "kept"
    events: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; non-finite floats become the strings "Infinity", "-Infinity", "NaN" (strict JSON)."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageResult:
        """Inverse of `to_json`.

        Raises:
            ValueError: A key is unknown or missing, or a value has the wrong type.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a stage is a JSON object with keys such as index and name, got {data!r:.80}")
        known = [f.name for f in fields(cls)]
        where = f"stage {data.get('index', '?')!r:.20}"
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(
                f"{where} has unknown keys {unknown!r:.200}; known keys are {known}: remove or rename them"
            )
        # A key may be left out exactly when the dataclass has a default for it.
        missing = [key for key in _REQUIRED if key not in data]
        if missing:
            raise ValueError(f"{where} lacks the keys {missing}: write them, or write the file with write_stages")
        return cls(**{key: _read(key, value, f"{where}, key {key!r}") for key, value in data.items()})


_INTS = frozenset({"index", "params", "block_params", "tokens"})
_NUMBERS = frozenset({"ppl", "kl", "top1", "retention", "seconds"})
_REQUIRED = ("index", "name", "params", "block_params", "ppl", "kl", "top1", "retention", "tokens", "seconds")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _number(value: Any, where: str) -> float:
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: expected a number, got {value!r:.80}")
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ValueError(f"{where}: expected a number of at most 19 digits, got {value!r:.80}")
    return float(value)


def _numbers(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected an object of numbers, got {value!r:.80}")
    return {str(key): _number(item, f"{where}[{key!r}]") for key, item in value.items()}


def _edit(value: Any, where: str) -> dict[str, Any]:
    layer = value.get("layer") if isinstance(value, Mapping) else None
    plain = isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < MAX_LAYERS
    if not plain or value.get("op") not in _OPS:
        raise ValueError(
            f"{where}: an edit has 'op' in {_OPS} and 'layer', an integer in 0..{MAX_LAYERS - 1}, got {value!r:.80}"
        )
    return dict(value)


def _read(key: str, value: Any, where: str) -> Any:
    if key in _INTS:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
            raise ValueError(f"{where}: expected an integer in 0..{MAX_NUMBER}, got {value!r:.80}")
        return value
    if key in _NUMBERS:
        return _number(value, where)
    if key in ("train_tokens_per_s", "tokens_per_s"):
        return None if value is None else _number(value, where)
    if key == "scores":
        return None if value is None else _scores(value, where)
    if key == "before":
        return None if value is None else _before(value, where)
    if key == "status":
        if value not in _STATUSES:
            raise ValueError(f"{where}: expected one of {_STATUSES}, got {value!r:.80}")
        return value
    if key == "name":
        return _text(value, where)
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {value!r:.80}")
    return [(_edit if key == "edits" else _text)(item, where) for item in value]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, got {value!r:.80}")
    return value


def _before(value: Any, where: str) -> dict[str, float]:
    numbers = _numbers(value, where)
    if set(numbers) - set(QUALITY):
        raise ValueError(f"{where}: expected keys among {QUALITY}, got {sorted(numbers)!r:.80}")
    return numbers


def _scores(value: Any, where: str) -> dict[str, float]:
    numbers = _numbers(value, where)
    if not all(key.isascii() and key.isdecimal() and len(key) < 5 for key in numbers):
        raise ValueError(f"{where}: expected layers as keys ('0', '1', ...), got {sorted(numbers)!r:.80}")
    return numbers


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
        results = [StageResult.from_json(cast(Mapping[str, Any], item)) for item in data]
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

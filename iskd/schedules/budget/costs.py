"""What every option of every layer costs: parameters and bytes off shapes, the cache off a real one, time by the clock.

Parameters are counted on the meta device. The cache is filled by a short prompt and lengthened, so that its bytes are
those that the models themselves hold. Times are taken of whole students, in which one option stands in every layer, in
turns with the teacher: what a layer costs is the difference to a student that has no layers, over their number.
Where a teacher has layers of several kinds (local and global attention), every kind is measured by itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.evaluation.efficiency import measure
from iskd.evaluation.results import AtContext
from iskd.models import Stack, scoring, surgery
from iskd.models.cache import layer_bytes, lengthen
from iskd.models.weights import cast_parameters, served, stored_as
from iskd.plan import Record
from iskd.plan.budget_plan import KEEP
from iskd.schedules.budget.library import TIMED, Library, code_digest
from iskd.schedules.budget.options import Option, kinds_of, layers_of, module_of
from iskd.schedules.budget.scores import Single
from iskd.schedules.budget.settings import LIMITS, TIMES, Budget
from iskd.schedules.budget.students import assembled, uniform
from iskd.system import machine, read_json, write_whole

_PROMPT = 256  # tokens that fill a cache; windows of mixers are shorter
_REPEATS, DECODED = 5, 16
_log = logging.getLogger(__name__)
_PASSING = ("load", "note", "allocator")  # what a machine is at one time and not at another


@dataclass(frozen=True)
class Costs:
    """What a student costs, as a sum over its layers.

    Attributes:
        keys: what was counted or measured, of `LIMITS`.
        layers: by layer and option (`KEEP` among them) one number for each key.
        others: outside the blocks, one number for each key.
    """

    keys: tuple[str, ...]
    layers: Mapping[Single, tuple[float, ...]]
    others: tuple[float, ...]

    def of(self, choice: Sequence[str]) -> dict[str, float]:
        """Of a whole student."""
        rows = [self.layers[layer, name] for layer, name in enumerate(choice)]
        return {
            key: other + sum(row[at] for row in rows)
            for at, (key, other) in enumerate(zip(self.keys, self.others, strict=True))
        }

    def column(self, key: str) -> dict[Single, float]:
        """One number for every option of every layer."""
        at = self.keys.index(key)
        return {single: row[at] for single, row in self.layers.items()}


Told = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


def _silent(_what: str, _done: int, _of: int) -> None:
    """Nobody is told."""


def counted(
    teacher: PreTrainedModel,
    options: Sequence[Option],
    budget: Budget,
    *,
    itemsize: int,
    seed: int,
    dtype: torch.dtype | None = None,
    told: Told = _silent,
) -> Costs:
    """What is exact, and known before anything is fitted: parameters and bytes off shapes, the cache off real ones.

    Args:
        teacher: the original, in evaluation mode, on its device.
        options: to choose from.
        budget: at which context and batch.
        itemsize: bytes of a number in the exported weights.
        seed: of fresh weights.
        dtype: in which students are served, and so what their caches hold; None = as the teacher is.
        told: see `Told`.
    """
    as_served = served(teacher, dtype)
    stack = Stack(as_served)
    depth = len(stack.layers)
    keep, outside = surgery.sizes(teacher, Record(depth))
    params: dict[Single, float] = {(layer, KEEP): float(size) for layer, size in keep.items()}
    stored = {at: size * itemsize for at, size in params.items()}
    caches = _caches(as_served, {}, budget)
    cached: dict[Single, float] = {(layer, KEEP): float(size) for layer, size in enumerate(caches)}
    for number, option in enumerate(options):
        told("counting options", number, len(options))
        where = layers_of(option, stack)
        if option.removes:
            for counts in (params, stored, cached):
                counts |= {(layer, option.name): 0.0 for layer in where}
            continue
        sizes, _ = surgery.sizes(*uniform(teacher, option, seed))
        blocks = {layer: module_of(option, stack, layer, seed) for layer in where}
        for block in blocks.values():
            if block is not None and dtype is not None:
                cast_parameters(block, dtype)
        held = _caches(as_served, blocks, budget)
        for layer in where:
            params[layer, option.name] = float(sizes[layer])
            stored[layer, option.name] = _stored(blocks[layer], itemsize)
            cached[layer, option.name] = float(held[layer])
    table = {"params": params, "bytes": stored, "cache_bytes": cached}
    others = {"params": float(outside), "bytes": float(outside * itemsize), "cache_bytes": 0.0}
    keys = tuple(key for key in LIMITS if key in table)
    return Costs(
        keys,
        {single: tuple(table[key][single] for key in keys) for single in params},
        tuple(others[key] for key in keys),
    )


def _stored(block: nn.Module | None, itemsize: int) -> float:
    """Bytes of a block's weights; some stay float32 in half precision."""
    half = torch.bfloat16 if itemsize == 2 else torch.float32
    each = () if block is None else stored_as(block, half)
    return float(sum(value.numel() * dtype.itemsize for _, value, dtype in each))


def timed(
    costs: Costs,
    teacher: PreTrainedModel,
    options: Sequence[Option],
    budget: Budget,
    *,
    library: Library,
    seed: int,
    dtype: torch.dtype | None = None,
    told: Told = _silent,
) -> Costs:
    """Costs that were counted, and times beside them.

    Args:
        costs: as `counted` has them.
        teacher: the original, in evaluation mode, on its device.
        options: to choose from.
        budget: at which context and batch.
        library: keeps what was measured.
        seed: of fresh weights.
        dtype: in which times are measured; None = as it is.
        told: see `Told`.

    Raises:
        ValueError: there is no memory for what is to be measured.
    """
    times, rest = _times(teacher, options, budget, library, seed, dtype, told)
    return Costs(
        (*costs.keys, *TIMES),
        {single: (*row, *(times[key][single] for key in TIMES)) for single, row in costs.layers.items()},
        (*costs.others, *(rest[key] for key in TIMES)),
    )


@torch.no_grad()
def _caches(teacher: PreTrainedModel, blocks: Mapping[int, nn.Module | None], budget: Budget) -> list[int]:
    """Bytes of each layer's slot of the cache after the context."""
    student = assembled(teacher, blocks)
    context = _context(budget)
    length = min(context, _PROMPT)
    ids = torch.zeros(budget.batch, length, dtype=torch.long, device=teacher.device)
    with scoring(student):
        cache = Stack(student).base(input_ids=ids, use_cache=True).past_key_values
    lengthen(cache, context - length)
    found = layer_bytes(cache)
    return [*found, *[0] * (len(Stack(teacher).layers) - len(found))]


def _context(budget: Budget) -> int:
    assert budget.context is not None, "Budget.at comes first"
    return budget.context


# ---- time ------------------------------------------------------------------------------------------------------------


def _times(
    teacher: PreTrainedModel,
    options: Sequence[Option],
    budget: Budget,
    library: Library,
    seed: int,
    dtype: torch.dtype | None,
    told: Told,
) -> tuple[dict[str, dict[Single, float]], dict[str, float]]:
    """By kind of time what each option of each layer takes in ms, and what is left without layers."""
    stack = Stack(teacher)
    depth, kinds = len(stack.layers), kinds_of(stack)
    there = [option for option in options if not option.removes]
    # each with the layers that it fills; the teacher itself is beside all of them, and by kinds where there are several
    own = [(kind, None) for kind in sorted({*kinds})] if len({*kinds}) > 1 else []
    students: dict[str, tuple[Option | None, list[int]]] = {"": (None, [])}
    for kind, option in [*own, *((kind, option) for option in there for kind in sorted({*kinds}))]:
        where = [at for at in (range(depth) if option is None else layers_of(option, stack)) if kinds[at] == kind]
        if where:
            students[_student(option, where)] = option, where
    file, facts = library.folder / f"times-{budget.context}-{budget.batch}.json", machine.describe(teacher.device)
    facts = {key: value for key, value in facts.items() if key not in _PASSING} | {"code": code_digest(TIMED)}
    known = _known(file, facts)
    for number, (name, (filled, where)) in enumerate(students.items()):
        told("measuring options", number, len(students))
        if name not in known:
            blocks: dict[int, nn.Module | None] = {at: None for at in range(depth) if filled or at not in where}
            blocks |= {} if filled is None else {at: module_of(filled, stack, at, seed) for at in where}
            known[name] = side_by_side(teacher, assembled(teacher, blocks), _context(budget), budget.batch, dtype)
            written = {"machine": facts, "times": known, "digest": _digest(facts, known)}
            write_whole(file, json.dumps(written, indent=1))
    # seconds of the teacher in all of these measurements, and of every student relative to the teacher beside it
    whole = [statistics.median(row[1][at] for row in known.values()) for at in range(len(TIMES))]
    ratio = {name: [row[0][at] / row[1][at] for at in range(len(TIMES))] for name, row in known.items()}
    layers: dict[str, dict[Single, float]] = {}
    others: dict[str, float] = {}
    for at, key in enumerate(TIMES):
        bare = ratio[""][at] * whole[at]
        each = {(layer, option.name): 0.0 for option in options if option.removes for layer in range(depth)}
        each |= {} if own else {(layer, KEEP): (whole[at] - bare) / depth for layer in range(depth)}
        for name, (filled, where) in students.items():
            per_layer = (ratio[name][at] * whole[at] - bare) / max(1, len(where))
            each |= {(layer, filled.name if filled else KEEP): per_layer for layer in where}
        others[key] = 1e3 * bare
        layers[key] = {single: 1e3 * max(0.0, seconds) for single, seconds in each.items()}
    return layers, others


def _student(option: Option | None, where: Sequence[int]) -> str:
    """The name of a student with an option, or the teacher's own blocks, at some layers and nothing elsewhere."""
    return f"{KEEP if option is None else option.digest}-{where[0]}-{len(where)}"


def side_by_side(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    context: int,
    batch: int,
    dtype: torch.dtype | None,
    seconds: float | None = None,
) -> tuple[list[float], list[float]]:
    """Seconds of a student and of its teacher, in turns: for the prompt, and for one more token.

    Repeated as far as `seconds` go; None = five times. Raises ValueError where there is no memory for them.
    """
    found = measure(
        {"teacher": teacher, "student": student}, contexts=(context,), decode_tokens=DECODED,
        repeats=_REPEATS, dtype=dtype, batch=batch, seconds=seconds,
    )  # fmt: skip
    rows: list[list[float]] = []
    for model in (found.student, found.teacher):
        at: AtContext | None = None if model is None else model.at(context)
        if at is None or not math.isfinite(at.prefill_seconds + at.decode_seconds_per_token):
            why = "" if model is None else model.left_out.get(context, "")
            raise ValueError(
                f"budget.context={context} and budget.batch={batch} cannot be measured here ({why}): lower them"
            )
        rows.append([at.prefill_seconds, at.decode_seconds_per_token])
    return rows[0], rows[1]


def _digest(facts: object, times: object) -> str:
    """Hex SHA-256 of what is written down."""
    return hashlib.sha256(json.dumps([facts, times], sort_keys=True).encode()).hexdigest()


def _known(file: object, facts: object) -> dict[str, tuple[list[float], list[float]]]:
    """What was measured before by this code on this very machine."""
    try:
        found = read_json(file)  # type: ignore[arg-type]
        if found["digest"] != _digest(found["machine"], found["times"]):
            _log.warning("%s is damaged: times are measured anew", file)
            return {}
        if found["machine"] != json.loads(json.dumps(facts)):
            return {}
        return {
            str(name): ([float(x) for x in mine], [float(x) for x in theirs])
            for name, (mine, theirs) in found["times"].items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}

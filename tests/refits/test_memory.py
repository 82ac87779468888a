"""Memory of fits and refits: one block of each model, and streams of all windows, which may lie on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iskd.blocks import warm_start
from iskd.evaluation import measure_quality
from iskd.models import Stack, surgery
from iskd.models.packing import Separator
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec
from iskd.plan.edits import Merge
from iskd.refits import Refit, reading, refit_survivors
from iskd.refits.calibrate import Calibrate
from iskd.refits.local import Local
from iskd.refits.magnitude import Magnitude
from iskd.refits.output import Output
from iskd.refits.replaceme import ReplaceMe
from iskd.refits.values import Values
from tests.factories import block_specs, louder, mixer_specs, text_of, tiny, windows

LENGTH, ROWS, HIDDEN, MLP = 16, 2, 48, 96
IDS = 3 * 8  # bytes: of a token in the text and in its parts
KINDS: dict[str, tuple[type[Refit], Edit, float]] = {  # and bytes of its streams for each token, as conf/refit says
    "output": (Output, Remove(1), 4 * (6 * HIDDEN + MLP)),
    "local": (Local, Remove(1), 20 * HIDDEN),
    "replaceme": (ReplaceMe, Remove(1), 12 * HIDDEN),
    "magnitude": (Magnitude, Remove(1), 4 * HIDDEN),
    "calibrate": (Calibrate, Convert(1, mixer_specs()["gla"], seed=3), 4 * HIDDEN),
    "values": (
        Values,
        Convert(1, Spec("iskd.mixers.sliding.Sliding", {"window": 3, "sinks": 1}), seed=3),
        4 * (6 * HIDDEN + 6 * LENGTH),
    ),
}
FITS: dict[str, Edit] = {
    **{name: Replace(2, spec) for name, spec in block_specs().items() if hasattr(spec.resolve(), "fit")},
    "merge": Merge(2),
}


class Live(TorchDispatchMode):
    """Most bytes of tensors that live at a time, those in files aside."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._seen = 0, 0
        self._live = dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                known = self._live.get(storage._cdata)
                if storage.filename is None and (known is None or known[0].expired()):
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._seen += storage.nbytes()
        if self._seen > self.most:  # those that are gone among them
            self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
            self._seen = sum(size for _, size in self._live.values())
            self.most = max(self.most, self._seen)
        return found


def growth(work: Callable[[int], None]) -> float:
    """Bytes that most memory grows by for each token more of the text; `work` takes windows."""
    most, counts = [], (8, 24)
    for count in counts:
        with Live() as live:
            work(count)
        most.append(live.most)
    return (most[1] - most[0]) / (counts[1] - counts[0]) / LENGTH


def models(edit: Edit, separator: Separator | None) -> tuple[Any, Any, Record, dict[int, Any]]:
    teacher = louder(tiny("llama", hidden=HIDDEN, mlp=MLP, layers=3))
    Stack(teacher).keep_apart(separator)
    student = copy.deepcopy(teacher)
    old = dict(enumerate(Stack(student).layers))
    return student, teacher, surgery.apply(student, Record(3), [edit]), old


@pytest.mark.parametrize(("place", "separator"), [("device", None), ("disk", Separator(7))])
@pytest.mark.parametrize("name", KINDS)
def test_a_refit_keeps_no_more_of_a_token_than_its_streams(
    name: str, place: str, separator: Separator | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On disk nothing is left, of documents apart neither, which have masks and positions in every window."""
    monkeypatch.setattr(reading, "_BATCH", ROWS * LENGTH)
    kind, edit, streams = KINDS[name]
    given: dict[str, Any] = {} if kind in (Magnitude, Calibrate) else {"streams": place}
    # as much work for any text
    given |= (
        {"epochs": 1, "step_tokens": ROWS * LENGTH}
        if kind is Local
        else {"ridge": 0.1}
        if kind in (Output, Values)
        else {}
    )

    def work(count: int) -> None:
        text = windows(count, LENGTH)
        refit = kind(tokens=3 * count * LENGTH // 4, held_tokens=count * LENGTH // 4, **given)
        student, teacher, record, _ = models(edit, separator)
        refit_survivors([refit], student, teacher, record, [edit], text_of([text], refit), folder=tmp_path)

    assert growth(work) <= IDS + (0 if "streams" in given and place == "disk" else streams)


@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize("name", FITS)
def test_a_fit_keeps_no_more_of_a_token_than_two_streams(name: str, place: str, tmp_path: Path) -> None:
    def work(count: int) -> None:
        student, teacher, record, old = models(FITS[name], Separator(7) if place == "disk" else None)
        fit, held = (
            list(part.split(ROWS)) for part in windows(count, LENGTH).split([3 * count // 4, count - 3 * count // 4])
        )

        def judge(held: Sequence[Tensor]) -> float:
            return measure_quality(student, teacher, [{"input_ids": batch} for batch in held])["kl"]

        warm_start(student, teacher, old, record, [FITS[name]], fit, held, judge, place, tmp_path)

    assert growth(work) <= IDS + (0 if place == "disk" else 8 * HIDDEN)

"""Tasks and text asked of the student at the start of a run and after every stage (`eval.every`)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from iskd.data import Framing
from iskd.evaluation import Asking, EvalSpec, Evaluation
from iskd.system import Json, ProgressLine, global_rank
from iskd.system.precision import serving_dtype
from iskd.teacher import Loaded
from iskd.training.state.undisturbed import undisturbed

_TOLD = ("tasks", "retention", "mean_retention", "text")


class AlongTheRun:
    """Asks one student after another the same questions, beside the teacher, who is asked once.

    Every process asks for itself, the same items in the same order: equal weights give equal answers, and models in
    shards are gathered block by block in every pass.

    Args:
        spec: what to ask.
        teacher: whose answers the students' are compared with.
        exclude: items that layers are chosen by.
        frame: how documents are framed.

    Attributes:
        seconds: what asking took in all, and of the first time by itself: teacher and student.
    """

    def __init__(self, spec: EvalSpec, teacher: Loaded, exclude: Sequence[str], frame: Framing) -> None:
        self.spec, self.teacher = spec, teacher
        self._exclude, self._frame = exclude, frame
        self._asking: Asking | None = None
        self.seconds: list[float] = []

    def ask(
        self,
        student: PreTrainedModel,
        source: Json | None = None,
        look: Callable[[], None] = lambda: None,
        quantize: Sequence[str] = (),
    ) -> Evaluation:
        """Scores of a student as it would be served; modes, random numbers and what keeps documents apart stay.

        Args:
            student: who is asked.
            source: what identifies it.
            look: called after every few items, and may raise to end it.
            quantize: kinds of fewer bits that it is measured in as well; the last student of a run alone is.
        """
        start = time.perf_counter()
        device = student.device
        dtype = serving_dtype(device)
        mixed = torch.autocast(device.type, dtype, enabled=dtype is not None)
        with undisturbed(student, self.teacher.model), mixed, ProgressLine() as line:

            def tell(what: str, done: int, total: int) -> None:
                if not global_rank():
                    line(what, done, total)
                look()

            if self._asking is None:
                options: dict[str, Any] = {"exclude": self._exclude, "frame": self._frame}
                self._asking = Asking(self.spec, self.teacher.tokenizer, self.teacher, **options)
            found = self._asking.ask(student, self.teacher.tokenizer, source or {"kind": "student"}, tell, quantize)
        self.seconds.append(time.perf_counter() - start)
        return found

    def told(self, student: PreTrainedModel, look: Callable[[], None] = lambda: None) -> Json:
        """Scores of a student for the row of its stage; `look` as of `ask`."""
        found = json.loads(self.ask(student, look=look).to_json())
        return {key: found[key] for key in _TOLD}

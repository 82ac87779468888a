"""A student in memory: its skeleton with the record applied, and the class it has."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from iskd.models import surgery
from iskd.plan import Record


class Edited:
    """Mixed into a loaded student's class: it knows its edits, and can be pickled and copied."""

    iskd_record: Record
    iskd_teacher_config: PreTrainedConfig

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled and copied by the teacher's class: that of a student is made where it is loaded and has no name."""
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        mixin = next(cls for cls in type(self).__mro__ if not issubclass(cls, PreTrainedModel))
        return _blank, (mixin, stock_class(cast(PreTrainedModel, self))), *state


def _blank(mixin: type[Edited], cls: type[PreTrainedModel]) -> PreTrainedModel:
    made = edited_class(cast(Any, mixin), cast(Any, cls))
    return made.__new__(made)


@cache
def edited_class(mixin: type[Edited], cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The teacher's own class with a kind of `Edited` mixed in."""
    return type(f"Iskd{cls.__name__}", (mixin, cls), {})


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The teacher's own class."""
    return next(cls for cls in type(model).__mro__ if issubclass(cls, PreTrainedModel) and not issubclass(cls, Edited))


def build(config: PreTrainedConfig, record: Record) -> PreTrainedModel:
    """A teacher's skeleton with the edits carried out, weights as they are drawn; no code of a hub is run."""
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
        surgery.apply(model, Record(record.num_layers), record.edits)
    return model

"""A student in memory: its skeleton with the record applied, its class, and what is asked of it beside loading."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from iskd.models import surgery
from iskd.plan import Record
from iskd.plan.edits import REMOVAL_OPS

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")


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


class Sizes:
    """Mixed into a student's config: the sizes that stand in its teacher's, and the layers that the record leaves."""

    def __getattr__(self, name: str) -> Any:
        teacher = vars(self).get("teacher")
        if name not in _SIZES or not teacher:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            if name == "num_hidden_layers":
                record = vars(self)["record"]
                return record["num_layers"] - sum(edit["op"] in REMOVAL_OPS for edit in record["edits"])
            return getattr(AutoConfig.for_model(**teacher), name)
        except (KeyError, TypeError, ValueError) as error:
            raise AttributeError(f"{name}: the teacher and the record in the config do not say it: {error}") from error


class OneAttention:
    """Mixed into a student's class: an attention that is asked for is that of compact blocks too.

    Each of them holds a config of its own, with its own numbers of heads, which transformers does not look for.
    """

    def set_attn_implementation(self, *args: Any, **options: Any) -> None:
        """As transformers' own."""
        cast(Any, super()).set_attn_implementation(*args, **options)
        config = cast(PreTrainedModel, self).config
        for module in cast(nn.Module, self).modules():
            own = vars(module).get("config")
            if isinstance(own, PreTrainedConfig) and own is not config:
                own._attn_implementation = config._attn_implementation

"""What transformers, and whoever uses it, asks of a student and of its config beside loading."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from iskd.plan.edits import REMOVAL_OPS

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")


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

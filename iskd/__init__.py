"""iskd: compress causal language models while they train.

    import iskd
    model = iskd.load("runs/.../model")    # a student, as the teacher's own class with its record applied
    result = iskd.compress(model, tokenizer, texts, schedule="iterative", edit="replace", block="slim")

After `import iskd`, `AutoModelForCausalLM.from_pretrained` opens exported students too. What runs (Hydra, W&B, data)
is imported when `compress` is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iskd.allocator import ask_for_huge_pages

ask_for_huge_pages()  # before torch is imported below

from iskd.loading import load, register  # noqa: E402
from iskd.plan import Convert, Record, Remove, Replace, Spec, Stage  # noqa: E402

if TYPE_CHECKING:
    from iskd.api import Result, compress

__version__ = "0.1.0"
__all__ = ["Convert", "Record", "Remove", "Replace", "Result", "Spec", "Stage", "compress", "load"]

register()


def __getattr__(name: str) -> Any:
    if name in ("Result", "compress"):
        from iskd import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

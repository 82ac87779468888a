"""iskd: compress causal language models while they train.

    import iskd
    model = iskd.load("runs/.../model")    # a student, as the teacher's own class with its record applied
    result = iskd.compress(model, tokenizer, texts, schedule="iterative", edit="replace", block="slim")

After `import iskd`, `AutoModelForCausalLM.from_pretrained` opens exported students too. What runs (Hydra, W&B, data)
is imported when `compress` is asked for.
"""

import os
import sys

# Before all other imports: `python -m iskd` looks for modules in the folder it is started in first, and a downloaded
# one may hold a torch.py.
if sys.argv[:1] == ["-m"] and any(
    flag[:1] == "-" and flag[-1:] == "m" and name.split(".")[0] == __name__
    for flag, name in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
):
    _package = os.path.dirname(os.path.abspath(__file__))
    if sys.path[0] == os.getcwd() and not os.path.samefile(sys.path[0], os.path.dirname(_package)):
        del sys.path[0]

from typing import TYPE_CHECKING, Any

import iskd.system  # noqa: F401 (first: it asks torch for huge pages before that is imported)
from iskd.export import loading as _loading
from iskd.export.loading import load, register
from iskd.plan.edits import Convert, Merge, Record, Remove, Replace, Spec
from iskd.plan.stage import Stage
from iskd.system.version import __version__

if TYPE_CHECKING:
    from iskd.commands.compress import Result, compress

__all__ = [
    "Convert",
    "Merge",
    "Record",
    "Remove",
    "Replace",
    "Result",
    "Spec",
    "Stage",
    "__version__",
    "compress",
    "load",
]

register()
# students written by 0.1 carry code that imports IskdForCausalLM from iskd.loading
sys.modules[f"{__name__}.loading"] = _loading


def __getattr__(name: str) -> Any:
    if name in ("Result", "compress"):
        from iskd.commands import compress as api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

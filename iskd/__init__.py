"""iskd: compress causal language models while they train.

    import iskd
    model = iskd.load("runs/.../model")    # a student, as the teacher's own class with its record applied
    result = iskd.compress(model, tokenizer, texts, schedule="iterative", edit="replace", block="slim")

After `import iskd`, `AutoModelForCausalLM.from_pretrained` opens exported students too. What runs (Hydra, W&B, data)
is imported when `compress` is asked for. The command line alone imports torch only once it knows what was asked.
"""

import os
import sys

# Before all other imports: `python -m iskd` looks for modules in the folder it is started in first, and a downloaded
# one may hold a torch.py.
_by_name = sys.argv[:1] == ["-m"] and any(
    flag[:1] == "-" and flag[-1:] == "m" and name.split(".")[0] == __name__
    for flag, name in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
)
_package = os.path.dirname(os.path.abspath(__file__))
if _by_name and sys.path[0] == os.getcwd() and not os.path.samefile(sys.path[0], os.path.dirname(_package)):
    del sys.path[0]

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import iskd.system  # noqa: E402, F401 (first: it asks torch for huge pages before that is imported)
from iskd.system.version import __version__  # noqa: E402

if TYPE_CHECKING:
    from iskd.commands.compress import Result, compress
    from iskd.export.loading import load
    from iskd.plan.edits import Convert, Merge, Record, Remove, Replace, Spec
    from iskd.plan.stage import Stage

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

_HOMES = {
    "iskd.plan.edits": ("Convert", "Merge", "Record", "Remove", "Replace", "Spec"),
    "iskd.plan.stage": ("Stage",),
    "iskd.export.loading": ("load", "register"),
    "iskd.commands.compress": ("Result", "compress"),
}


def know_students() -> None:
    """Tell transformers' Auto classes about students: done by `import iskd`, on the command line by its commands."""
    loading = import_module("iskd.export.loading")
    loading.register()
    # students written by 0.1 carry code that imports IskdForCausalLM from iskd.loading
    sys.modules[f"{__name__}.loading"] = loading


def _is_command_line() -> bool:
    """Whether this process was started as `iskd`, `python -m iskd` or train.py: it answers --help without torch."""
    started = sys.argv[0] if sys.argv else ""
    script = os.path.join(os.path.dirname(_package), "train.py")
    ours = os.path.isfile(script) and os.path.isfile(started) and os.path.samefile(started, script)
    return _by_name or ours or os.path.basename(started) in ("iskd", "iskd.exe")


if not _is_command_line():
    know_students()


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            if home.startswith("iskd.commands."):
                import_module("iskd.commands").check_installed()
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

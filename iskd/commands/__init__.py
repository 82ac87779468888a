"""Config to objects: one file per `iskd COMMAND`, each with a `main`, and `iskd.compress`.

The only rooms that know Hydra are this one and its sub-rooms `values` and `build`. Its face is the command line, and
`iskd` itself hands on `compress`. Nothing is imported here: a command pays for its own imports only. What opens a
student is installed with the package, what the commands need with its extra `train`.
"""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = ("hydra", "lightning", "matplotlib", "rich", "scipy", "torchmetrics", "wandb")


def check_installed() -> None:
    """Raise ImportError where packages are missing that every command needs, whatever it does; help needs none."""
    if missing := [name for name in _NEEDED if not find_spec(name)]:
        raise ImportError(
            f"the commands of iskd need {', '.join(missing)}, not installed here: pip install 'iskd[train]'"
        )

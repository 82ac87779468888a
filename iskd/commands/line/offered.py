"""Options of a budget as people write them, and with the parts that they name in full.

{edit: replace, block: {name: slim, ratio: 0.4}}
{edit: convert, mixer: gla}
"""

from __future__ import annotations

from typing import Any

from iskd.commands.line.steps import part_named

_GROUPS = ("block", "mixer")


def options_as_meant(offered: Any) -> dict[str, dict[str, Any]]:
    """The options of `budget.options` that say what is done to a layer, the parts that they name put in, in place.

    What is no option at all is left for the budget to refuse, which also reads plans.

    Raises ValueError where an option names a part that there is not.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, option in offered.items() if isinstance(offered, dict) else ():
        if isinstance(option, dict) and "edit" in option:
            for group in _GROUPS:
                if option.get(group) is not None:
                    option[group] = part_named(group, option[group], f"budget.options.{name}")
            found[name] = option
    return found

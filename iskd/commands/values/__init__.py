"""What the keys of a config take: values and paths as they are meant, nodes as plain values or objects.

Imports: system, plan, losses, commands.line.
"""

from __future__ import annotations

from iskd.commands.values.config import as_meant, class_of, object_of, plain, spec, terms
from iskd.commands.values.paths import at_home

__all__ = ["as_meant", "at_home", "class_of", "object_of", "plain", "spec", "terms"]

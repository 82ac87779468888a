"""What a run does and did, as frozen values: edits, record, stages, options, results.

No torch; all of it is JSON and prints itself.

Imports: system.
"""

from __future__ import annotations

from iskd.plan.edits import Convert, Edit, Record, Remove, Replace, Spec, allow
from iskd.plan.reading import to_json
from iskd.plan.results import StageResult
from iskd.plan.stage import Stage

__all__ = ["Convert", "Edit", "Record", "Remove", "Replace", "Spec", "Stage", "StageResult", "allow", "to_json"]

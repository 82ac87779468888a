"""[shelf] Compact blocks, which stand where a teacher's block stood.

They inherit from it by `from_block`, or by a ridge fit on calibration text (`fitting`). `merge` makes one of the host's
own blocks out of two.

Imports: system, plan, models.
"""

from __future__ import annotations

from iskd.blocks.fitting import Fitted, warm_start
from iskd.blocks.merge import Merged, check_mergeable, check_text
from iskd.blocks.regression import Regression
from iskd.blocks.ridge import Ridge
from iskd.blocks.slicing import inputs_of

__all__ = ["Fitted", "Merged", "Regression", "Ridge", "check_mergeable", "check_text", "inputs_of", "warm_start"]

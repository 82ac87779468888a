"""`iskd search model=... budget.params=[0.9,0.8,...]`: search for plans without training anything."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from iskd.commands.arguments import hydra_main, output_folder
from iskd.commands.build import asked_of, teacher_of, text_data
from iskd.commands.search.front import front_table, write_plans
from iskd.commands.values import as_meant, object_of
from iskd.models import Stack
from iskd.report.terminal import print_table, terminal
from iskd.schedules.budget import RefusedError, plans_for

if TYPE_CHECKING:
    from iskd.plan.budget_plan import BudgetPlan


def main() -> None:
    """The command of this process; without `experiment=` it searches for what `experiment=budget` carries out."""
    if not any(argument.startswith("experiment=") for argument in sys.argv):
        sys.argv.append("experiment=budget")
    elif not any(argument.startswith("budget=") for argument in sys.argv):
        sys.argv.append("budget=default")
    _main()


@hydra_main
def _main(config: Any) -> None:
    refused: RefusedError | None = None
    try:
        plans = plans_of(config)
    except RefusedError as error:  # of some budgets; what was found for the others is written first
        plans, refused = error.plans, error
    if refused and not plans:
        raise refused
    if not plans:
        return  # a process that has fitted its share of the layers
    console = terminal()
    print_table(front_table(plans), spare=("of the teacher",), console=console)
    for file in write_plans(output_folder(), plans):
        console.print(str(file), soft_wrap=True)
    if refused:
        raise refused


def plans_of(config: Any) -> list[BudgetPlan]:
    """A plan for every budget of a config.

    Raises:
        RefusedError: some limits of time cannot be met; plans for the others come with it.
        ValueError: nothing can be searched for.
    """
    config = as_meant(config)
    if not config.get("budget"):
        raise ValueError("iskd search needs a budget: set budget=default and budget.params=[0.9,0.8,0.7]")
    budget = object_of(config.budget)
    if budget.plan is not None:
        raise ValueError("budget.plan names a plan that is found already: it is for iskd train experiment=budget")
    teacher, start = teacher_of(config)
    if start is not None:
        raise ValueError(
            f"iskd search plans for a teacher, and {start} is a student: give model= its teacher, or take the student "
            f"itself for one: reference={start}, or where it needs iskd, in Python: iskd.compress(iskd.load(...), ...)"
        )
    data = text_data(config, teacher.tokenizer, Stack(teacher.model))
    return plans_for(budget, asked_of(config, teacher, data))

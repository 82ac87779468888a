"""What a run within a budget is searched for: its steps, and what the search needs to know."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from iskd.blocks import inputs_of
from iskd.commands.build.at_the_end import export_of
from iskd.commands.line.steps import steps_as_meant
from iskd.commands.values import class_of, object_of, plain
from iskd.data import TextData
from iskd.export.student import native_config
from iskd.models import Stack
from iskd.plan import Remove, Stage
from iskd.refits import check_sizes
from iskd.report.budget import choice_table
from iskd.report.terminal import print_table, terminal
from iskd.schedules.budget import Asked, plan_for, steps_of
from iskd.schedules.mixed import Mixed
from iskd.system import global_rank
from iskd.system.files import expanded
from iskd.teacher import Loaded

LOSES = {"heads": ("qwen2", "phi"), "channels": ("phi", "gpt2")}
"""Families whose students with fewer heads or channels vLLM or llama.cpp refuses, though not the teacher.

As the table of docs/loading.md has it, which says too of which families nothing is known.
"""


def within_budget(config: DictConfig, teacher: Loaded, data: TextData, run_dir: Path, start: Path | None) -> DictConfig:
    """Search for a plan within the budget, and show it; the config with its steps in the schedule that carries it out.

    The run's own config stays as it was given: the plan lies beside it, and a resumed run finds it there.
    """
    if class_of(config.schedule) is not Mixed:
        raise ValueError("budget= finds the steps of schedule=mixed: set that too, as experiment=budget does")
    if config.schedule.steps:
        raise ValueError("budget= finds the steps of schedule=mixed: leave schedule.steps out, or drop budget=")
    if start is not None:
        raise ValueError(f"budget= plans for a teacher, and {start} is a student: give model= its teacher")
    plan = plan_for(object_of(config.budget), asked_of(config, teacher, data), run_dir)
    if global_rank() == 0:
        print_table(choice_table(plan))
    values = plain(config)
    scheduled = {**values["schedule"], "steps": steps_of(plan)}
    steps_as_meant(scheduled)
    carried = OmegaConf.create({**values, "schedule": scheduled})
    assert isinstance(carried, DictConfig)
    return carried


def asked_of(config: DictConfig, teacher: Loaded, data: TextData) -> Asked:
    """What a search for plans needs of a run.

    Raises ValueError for refits that no plan could carry out.
    """
    refits = [object_of(config.refit[name]) for name in config.get("refit") or ()]
    for refit in refits:  # a search takes long, and its plan would be refused for this
        refit.check(Stack(teacher.model))
    check_sizes([(Stage("removals", (Remove(0),)), refits)], [])
    dtype = (export_of(plain(config.export)) or {}).get("dtype", "auto")
    return Asked(
        teacher=teacher.model,
        windows=data.calibration,
        separator=data.separator,
        trainer=plain(config.trainer),
        cache_dir=Path(config.cache_dir or expanded("~/.cache/iskd")),
        stored=str(teacher.source.get("stored", "float32")) if dtype == "auto" else dtype,
        native=opened_elsewhere,
        refits=refits,
        note=lambda sentence: terminal().print(sentence, soft_wrap=True),
    )


def opened_elsewhere(model: PreTrainedModel) -> bool:
    """Whether plain transformers opens a student, and vLLM and llama.cpp do as far as they open its teacher."""
    if native_config(model) is None:
        return False
    stack = Stack(model)
    dims, block, kind = stack.dims, stack.layers[0], model.config.model_type
    heads, channels = (inputs_of(block.get_submodule(path)) for path in (stack.family.out, stack.family.down))
    fewer = {"heads": heads < dims.heads * dims.head_dim, "channels": channels < dims.mlp}
    return not any(less and kind in LOSES[what] for what, less in fewer.items())

"""`debug=smoke` goes with everything: each experiment, and each schedule with each edit, under each trainer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import iskd
from iskd.commands.compose import compose_config, parts
from iskd.commands.values.config import spec
from iskd.models import surgery
from iskd.plan import Record, Replace
from iskd.schedules import History, forecast
from iskd.system.version import options
from iskd.training import Parts, run
from tests.factories import windows

EXPERIMENTS = options("experiment")
# align is of conversions alone, with and without smoke
PAIRS = [
    *([f"schedule={schedule}", f"edit={edit}"] for schedule in ("iterative", "oneshot") for edit in options("edit")),
    *(["schedule=align", "edit=convert"], ["schedule=none"]),
    ["schedule=mixed", "schedule.steps=[{edit: remove, count: 1}, {edit: convert, mixer: gla, layers: [2]}]"],
]
NEEDS = {"budget": ["budget.params=0.5", "budget.use=[remove]", "budget.fit_tokens=128", "budget.held_tokens=128"]}
"""What has to be said beside the name of an experiment."""
FAST = ("ild", "iskd_gpt2_paper", "subquadratic")
"""One of each kind; the others differ from them by numbers and parts."""
WHAT = [
    *PAIRS,
    *(
        pytest.param(
            [f"experiment={name}", *NEEDS.get(name, [])], marks=() if name in FAST else pytest.mark.slow, id=name
        )
        for name in EXPERIMENTS
    ),
]
QUICK = (
    *("trainer=cpu", "trainer.precision=32-true", "trainer.progress=false", "schedule.tokens=1024", "export=false"),
    *(
        "data.val_tokens=256",
        "run.fit_tokens=128",
        "run.score_tokens=128",
        "run.efficiency_seconds=0",
        "run.samples=0",
        "run.mfu=false",
    ),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def made(overrides: list[str], cache: Path, run_dir: Path) -> Parts:
    # the order in which both stand on the command line means nothing
    return parts([*overrides, "debug=smoke", *QUICK, f"cache_dir={cache}"], run_dir)


@pytest.mark.parametrize("overrides", WHAT)
def test_smoke_runs_with_everything(overrides: list[str], cache: Path, tmp_path: Path) -> None:
    result = run(made(overrides, cache, tmp_path))
    edits = 0 if "schedule=none" in overrides or "experiment=finetune" in overrides else 2
    assert len(result.record.edits) == edits
    assert result.final.tokens > 0


def test_smoke_builds_every_experiment_and_every_block(cache: Path, tmp_path: Path) -> None:
    for name in EXPERIMENTS:
        built = made([f"experiment={name}", *NEEDS.get(name, [])], cache, tmp_path / name)
        history = History(Record(4), scores=dict.fromkeys(range(4), 0.0))
        assert built.teacher.model.config.num_hidden_layers == 4
        assert forecast(built.schedule, history), "the schedule fits the tiny model"
    teacher = built.teacher.model
    for name in options("block"):
        config, _ = compose_config([f"block={name}", "debug=smoke"], Path("unused"))
        surgery.apply(copy.deepcopy(teacher), Record(4), (Replace(1, spec(config.block)),))


def test_every_schedule_is_known_to_the_test() -> None:
    assert set(options("schedule")) == {override[0].partition("=")[2] for override in PAIRS}


@pytest.mark.parametrize("trainer", options("trainer"))
def test_smoke_composes_under_every_trainer(trainer: str) -> None:
    for overrides in (["schedule=none"], ["experiment=ild"], ["experiment=subquadratic"]):
        config, _ = compose_config(["debug=smoke", *overrides, f"trainer={trainer}"], Path("unused"))
        assert config.model.name == "tiny"
        assert config.schedule.get("target_layers") is None
    with pytest.raises(ValueError, match=r"schedule\.count is a key of schedule=align, .*=oneshot alone"):
        compose_config(["debug=smoke", "schedule=none", "schedule.count=2"], Path("unused"))


def test_a_key_on_the_command_line_goes_before_smokes() -> None:
    config, _ = compose_config(
        ["debug=smoke", "schedule.count=3", "schedule.order=alternate", "edit=remove"], Path("unused")
    )
    assert (config.schedule.count, config.schedule.order) == (3, "alternate")


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_one_width_is_a_student_of_the_teachers_own_architecture(family: str, cache: Path, tmp_path: Path) -> None:
    """`experiment=width` leaves what plain transformers opens, fewer heads and channels in every layer."""
    words = [
        "experiment=width",
        "block.ratio=0.5",
        f"model.config.model_type={family}",
        "schedule.count=-1",
        "export=true",
    ]
    asked = [word for word in QUICK if word != "export=false"]
    result = run(parts([*words, "debug=smoke", *asked, f"cache_dir={cache}"], tmp_path))
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert type(model).__module__.startswith("transformers.models.")
    assert model.config.num_attention_heads == 2 < 4
    assert model.config.intermediate_size < 176
    own = iskd.load(result.model_dir)
    ids = windows(2, 8)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, own.eval()(ids).logits)

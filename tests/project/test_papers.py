"""The presets that are papers, against the papers' own numbers; their plans need neither weights nor text."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from iskd.commands import build
from iskd.commands.compose import compose_config
from iskd.commands.train import planned
from iskd.plan.run_files import PLAN_FILE
from iskd.system.faults import UnavailableError

_SMALL = ("data.seq_len=64", "trainer.accumulate_grad_batches=1")
AWAY = UnavailableError("the model OWNER/NAME could not be had: there is no network. What works offline: nothing")


def plan_of(experiment: str, folder: Path, *keys: str) -> list[Any]:
    config, _ = compose_config([f"experiment={experiment}", "plan_only=true", *keys], folder)
    build.plan_without(config, folder, AWAY)
    rows: list[Any] = json.loads((folder / PLAN_FILE).read_text())
    return rows


def layers(rows: list[Any]) -> list[int]:
    return [edit["layer"] for row in rows[1:] for edit in row["edits"]]


@pytest.mark.parametrize(
    ("name", "teacher", "student", "order", "batch", "decay"),
    [
        ("iskd_gpt2_paper", 124_439_808, 86_264_832, [5, 7, 3, 9, 1, 11], 8, "linear"),
        (
            "iskd_phi1_paper",
            1_418_270_720,
            990_494_720,
            [9, 1, 19, 15, 14, 7, 17, 8, 10, 11, 13, 20],
            16,
            "constant",
        ),
    ],
)
def test_iskd(
    name: str, teacher: int, student: int, order: list[int], batch: int, decay: str, tmp_path: Path, capsys: Any
) -> None:
    rows = plan_of(name, tmp_path)
    assert (rows[0]["params"], rows[-1]["params"], layers(rows)) == (teacher, student, order)
    for row in rows[1:]:
        assert (row["lr"], row["lr_new"], row["losses"], row["decay"]) == (2e-5, 1e-4, "ce", decay)
        assert (row["budget"], row["train"], row["trained"]) == ("1 pass", "all", row["params"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"1 pass in a stage; steps of {batch} batch x 128 tokens, on roneneldan/TinyStories" in said
    assert "times are left open: the model OWNER/NAME could not be had: there is no network" in said
    config, _ = compose_config([f"experiment={name}"])
    assert (config.data.source.max_documents, config.data.bos, config.optim.anew) == (50_000, "bare", True)
    assert config.data.validation_fraction + config.data.calibration_fraction == pytest.approx(0.1)
    by_tokens = plan_of(name, tmp_path, "schedule.epochs=null", f"schedule.tokens={len(order)}e7")
    steps = {row["steps"] for row in by_tokens[1:]}
    assert steps <= {9_765, 9_766} if batch == 8 else steps <= {4_882, 4_883}


def test_ild(tmp_path: Path) -> None:
    rows = plan_of("ild_paper", tmp_path)
    assert (len(rows[1:]), rows[-1]["params"]) == (12, 2_161_014_784)
    assert rows[8]["params"] == 2_469_322_752, "28 layers"
    for row in rows[1:]:
        assert (row["steps"], row["train"], row["lr"], row["decay"]) == (row["steps"], "adjacent", 1e-4, "cosine")
        assert row["steps"] in (1953, 1954)
        assert row["losses"] == "kl_sum + hidden + final"
        assert "lr_new" not in row, "a removal makes nothing that is new"
    config, _ = compose_config(["experiment=ild_paper"])
    documents = config.data.source.max_documents
    held = (config.data.validation_fraction + config.data.calibration_fraction) * documents
    assert (documents, held) == (503_000, pytest.approx(3_000, abs=5))
    assert config.data.batch_size * config.trainer.accumulate_grad_batches == 256
    assert config.data.seq_len == config.loss.kl_sum.seq_len == 2048
    assert config.importance._target_.endswith("TaskAccuracy")
    shorter, _ = compose_config(["experiment=ild_paper", "data.seq_len=512"])
    assert shorter.loss.kl_sum.seq_len == 512, "the factor follows the window"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has nothing of the hub and may not ask it."""

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan asks the network for nothing")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "create_connection", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)


def test_the_command_plans_what_cannot_be_had(offline: None, tmp_path: Path, capsys: Any) -> None:
    """Text, the files of tasks that layers are chosen by, and tasks of an evaluation: said in the plan, no error."""
    tiny = ["plan_only=true", "model=tiny", f"cache_dir={tmp_path}/cache", "trainer=cpu", "trainer.progress=false"]
    cases = {
        "ild_paper": (
            ["data=sample", "schedule.target_layers=2", "schedule.tokens=4096"],
            "importance.data_dir is not",
        ),
        "iskd": (["data=tinystories", "schedule.count=1"], "could not be loaded"),
        "l1": (["data=sample", "eval=quick", "data.seq_len=64"], "tasks and text are not in the plan's time: the data"),
    }
    before = constants.HF_HUB_OFFLINE
    for name, (keys, said) in cases.items():
        config, folder = compose_config([f"experiment={name}", *tiny, *keys], tmp_path / name)
        planned(config, folder)
        assert said in " ".join(capsys.readouterr().out.split()), name
        assert len(json.loads((folder / PLAN_FILE).read_text())) > 1
    assert before == constants.HF_HUB_OFFLINE


def test_an_every_that_is_longer_than_the_run_is_refused_without_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.every=99999: the run trains on [0-9,]+ tokens"):
        plan_of("ild_paper", tmp_path, "eval=validation", "eval.every=99999", "schedule.tokens=4096", *_SMALL)


def test_subquadratic(tmp_path: Path) -> None:
    rows = plan_of("subquadratic_paper", tmp_path)
    assert rows[0]["params"] == 361_821_120
    assert [row["tokens"] / 1e6 for row in rows[1:]] == pytest.approx([78, 159, 2763], rel=1e-3)
    assert [(row["lr"], row["decay"]) for row in rows[1:]] == [(2e-4, "wsd"), (2e-3, "wsd"), (3e-4, "linear")]
    assert [row["losses"] for row in rows[1:]] == ["matrix", "hidden", "ce + 512 kl"]
    assert layers(rows) == list(range(32))
    config, _ = compose_config(["experiment=subquadratic_paper", "data.seq_len=128"])
    assert config.loss.kl.weight == 128
    assert config.data.validation_fraction + config.data.calibration_fraction <= 1e-3, "3 G tokens are learned once"


def test_a_plan_without_a_models_sizes_says_what_is_missing(tmp_path: Path) -> None:
    config, _ = compose_config(["model=openai/nothing", "plan_only=true"], tmp_path)
    with pytest.raises(UnavailableError, match="could not be had"):
        build.plan_without(config, tmp_path, AWAY)

"""What `model=` names, errors of commands without a traceback, how W&B runs are called, lines about long work."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from iskd.__main__ import main
from iskd.commands.arguments import arguments, named_model
from iskd.commands.values.config import NEEDED, plain
from iskd.system import Busy
from iskd.system.version import options
from iskd.training.metrics import loggers_of
from tests.factories import CONF


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ISKD_COMMAND", raising=False)
    for folder in ("runs/there", "tiny", "it's, a [folder]"):
        (tmp_path / folder).mkdir(parents=True)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("smollm2", ["model=smollm2"]),
        ("tiny", ["model=tiny"]),
        ("./tiny", ["model=local", "model.path='./tiny'"]),
        ("runs/there", ["model=local", "model.path='runs/there'"]),
        ("owner/name-1.5", ["model=hub", "model.name='owner/name-1.5'"]),
        ("smollm2,gpt2", []),
        ("distilgpt2", ["model=hub", "model.name='distilgpt2'"]),
        ("gpt2-xl", ["model=hub", "model.name='gpt2-xl'"]),
        ("", []),
    ],
)
def test_a_name_is_a_preset_a_folder_or_on_the_hub(name: str, overrides: list[str]) -> None:
    assert named_model(name) == overrides
    assert arguments([f"model={name}", "seed=1"]) == [*(overrides or [f"model={name}"]), "seed=1"]


@pytest.mark.parametrize("name", ["SmolLM2", "smolm2", "GPT2", "SMOLLM2_360M"])
def test_a_mistyped_preset_is_not_asked_of_the_hub(name: str) -> None:
    near = {"smolm2": "smollm2"}.get(name, name.lower())
    with pytest.raises(ValueError, match=rf"did you mean {near}\?\); .* is model=hub model\.name={name}"):
        named_model(name)


@pytest.mark.parametrize("name", ["plain", "with space", "a=b,c", "it's, a [folder]", "{x}"])
def test_a_folder_of_any_name_is_read_by_hydra(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(exist_ok=True)
    kind, path = named_model(f"./{name}")
    assert kind == "model=local"
    assert OverridesParser.create().parse_overrides([path])[0].value() == f"./{name}"


@pytest.mark.parametrize("argument", ["model=smollm2,gpt2", "model.seed=1", "mixer=gla"])
def test_anything_else_is_left_to_hydra(argument: str) -> None:
    assert arguments([argument]) == [argument]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("loss=null", "loss=null is no choice: use one of ce, "),
        ("optim=null", "optim=null is no choice: use one of "),
        *((f"{group}=[]", f"{group}=[] is no choice: use one of {options(group)[0]}") for group in NEEDED),
        ("loss=[kl,kl]", "loss=[kl,kl]: kl stands twice"),
        ("loss=[ce],[ce, kl ,kl]", "kl stands twice"),
        ("refit=[output,local,output]", "output stands twice"),
    ],
)
def test_no_choice_and_a_double_one_are_refused(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments([argument])
    assert f"error: {argument.partition('=')[0]}=" in (said := capsys.readouterr().err)
    assert message in said
    same = ["loss=[ce,kl],[kl]", "refit=[]", "trainer.devices=[0,0]", "resume=null"]
    assert arguments(same) == same


@pytest.mark.parametrize("name", ["runs/x", "./x", "../nowhere", "/no/where", "~/no/where/at/all", "a/b/c"])
def test_a_mistyped_folder_is_not_asked_of_the_hub(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"model='{name}': no such folder"):
        named_model(name)
    with pytest.raises(SystemExit) as stop:
        arguments([f"model={name}"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: model=")
    assert ("there is a folder 'runs'" in said) == (name == "runs/x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "runs/x"], "no such folder: runs/x; a run's folder"),
        (["report", "runs/there"], "no run in runs/there: looked for stages.json or config.yaml"),
        (["curve", "out.png", "runs/x"], "runs/x is no such folder; a run's folder"),
        (["curve", "out.png", "name=runs/there"], "runs/there is no run; a run's folder"),
    ],
)
def test_a_wrong_folder_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["iskd", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("offline", ["auto", True])
def test_wandb_runs_are_named_after_their_folders(offline: object, tmp_path: Path) -> None:
    """Online or not; what the user names stays."""
    job = tmp_path / "sweep" / "3"
    job.mkdir(parents=True)
    (job.parent / "multirun.yaml").write_text("")
    node = OmegaConf.load(CONF / "logger" / "wandb.yaml")
    for given, expected in (({}, ("3", "sweep")), ({"name": "mine", "group": "ours"}, ("mine", "ours"))):
        (logger,) = loggers_of({**plain(node), "offline": offline, **given}, job, instantiate)
        assert (logger._wandb_init["name"], logger._wandb_init["group"]) == expected
    assert loggers_of({}, job, instantiate) == []


def test_a_logger_without_its_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iskd.training.metrics.chosen.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs tensorboard, .*: pip install 'iskd\[tensorboard\]'"):
        loggers_of(plain(OmegaConf.load(CONF / "logger" / "tensorboard.yaml")), tmp_path, instantiate)


def test_long_work_says_that_it_goes_on_and_short_work_nothing() -> None:
    short, long = io.StringIO(), io.StringIO()
    with Busy("loading", short):
        pass
    with Busy("loading", long, first=0.01, every=0.01):
        deadline = time.monotonic() + 20
        while long.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = long.getvalue().splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("loading: ") and line.endswith(" s so far") for line in lines)
    assert short.getvalue() == ""
    expected = Busy("loading", expected=20.0)
    assert expected._left(5.0) == ", about 15 s left"
    assert expected._left(20.0) == ", longer than the 20 s expected"

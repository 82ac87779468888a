"""What loggers and sweeps are told of a run: one summary, tables, pictures, groups; W&B offline, no network."""

from __future__ import annotations

import dataclasses
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread

from iskd.commands.compose import compose_config
from iskd.commands.values.config import as_meant, plain
from iskd.plan import StageResult
from iskd.plan.metric_names import METRICS, QUALITY, X_AXIS
from iskd.plan.results import write_stages
from iskd.plan.summary import OBJECTIVES, SUMMARY, objectives, summary
from iskd.report import write_report
from iskd.system import Json
from iskd.system.faults import RunError
from iskd.training.metrics import chosen, loggers_of, sweep_of
from iskd.training.metrics.loggers import COLUMNS, log_end, log_row, log_start, tracked_as
from tests.factories import CONF


def stage(index: int, **changes: Any) -> StageResult:
    values: dict[str, Any] = {
        "index": index,
        "name": f"replace {index}" if index else "teacher",
        "edits": [{"op": "replace", "layer": index}] if index else [],
        "params": 1000 - 100 * index,
        "block_params": 800 - 100 * index,
        "ppl": 20.0 + index,
        "kl": 0.1 * index,
        "top1": 1 - 0.1 * index,
        "retention": 1 - 0.05 * index,
        "tokens": 512 * index,
        "seconds": 2.0,
        "scores": {"0": 0.5, "1": 0.25} if index == 1 else None,
    }
    return StageResult(**values | changes)


RESULTS = [stage(0), stage(1), stage(2), stage(3, status="rolled_back", retention=0.1)]


class FakeConfig(dict[str, Any]):
    def update(self, values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


class FakeRun:
    """Stands in for a W&B run and notes what it is told."""

    def __init__(self) -> None:
        self.id, self.metrics, self.rows, self.artifacts = "abc", {}, [], []
        self.summary: dict[str, Any] = {}
        self.config = FakeConfig()

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics[name] = options

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def log_artifact(self, artifact: Any, aliases: Any = None) -> None:
        self.artifacts.append(artifact)
        self.aliases = aliases


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 3\nschedule: {count: 2}\n")
    write_stages(folder, RESULTS)
    write_report(folder)
    return folder


def test_the_summary_is_that_of_the_student_that_is_left() -> None:
    values = summary(RESULTS)
    assert values.keys() == SUMMARY.keys()
    assert (values["final/retention"], values["final/params"], values["teacher/params"]) == (0.9, 800, 1000)
    assert (values["final/tokens"], values["final/seconds"]) == (1536, 8.0)
    assert summary(RESULTS[1:]).keys() == {name for name in SUMMARY if name.startswith("final/")}
    with pytest.raises(ValueError, match="no stage was kept"):
        summary(RESULTS[3:])


def test_a_sweep_is_told_what_it_asks_for() -> None:
    assert objectives("ppl")(RESULTS) == 22.0
    assert objectives(["kl"])(RESULTS) == pytest.approx(0.2)
    assert objectives(["retention", "params"])(RESULTS) == [0.9, 800.0]
    assert set(OBJECTIVES) >= {*QUALITY, "params"}
    with pytest.raises(RunError, match="the run ended with kl=nan, which a sweep cannot compare"):
        objectives(["params", "kl"])([*RESULTS[:2], dataclasses.replace(RESULTS[2], kl=math.nan)])
    for names in (["retention", "size"], [], "loss"):
        with pytest.raises(ValueError, match="choose among retention, params"):
            objectives(names)


def test_wandb_gets_tables_pictures_files_and_one_summary(run_dir: Path) -> None:
    run = FakeRun()
    loggers = [WandbLogger(experiment=run), CSVLogger(str(run_dir))]
    log_start(loggers, run_dir)
    assert run.metrics["*"] == {"step_metric": "tokens", "summary": "none"}
    assert run.config["schedule"] == {"count": 2}
    log_end(loggers, run_dir, RESULTS)
    assert run.summary == summary(RESULTS)
    (row,) = run.rows
    assert row["tokens"] == 1536
    assert row["stages"].columns == list(COLUMNS)
    assert [line[COLUMNS.index("status")] for line in row["stages"].data] == [*["kept"] * 3, "rolled_back"]
    assert row["importance"].data == [[1, 0, 0.5], [1, 1, 0.25]]
    scores = row["scores"]
    assert scores.columns == ["blocks edited", "layers left", "tokens", "retention"]
    assert [(line[0], line[2], line[3]) for line in scores.data] == [(0, 0, 1.0), (1, 512, 0.95), (2, 1024, 0.9)]
    charts = {name: chart.table.data for name, chart in row.items() if name.startswith("retention by ")}
    assert charts == {
        "retention by blocks edited": [[0, 1.0], [1, 0.95], [2, 0.9]],
        "retention by tokens": [[0, 1.0], [512, 0.95], [1024, 0.9]],
    }, "no layer goes, so nothing is drawn against those left"
    assert row["report"].html == (run_dir / "report.html").read_text()
    assert imread(run_dir / "run.png").shape[:2] == (600, 1200)
    (artifact,) = run.artifacts
    files = {"stages.json", "stages.csv", "report.html", "run.png", "config.yaml"}
    assert (set(artifact.manifest.entries), run.aliases) == (files, ["final", "run"])
    (run_dir / "model").mkdir()
    for name in ("model/config.json", "metrics.csv"):
        (run_dir / name).write_text("{}")
    (run_dir / "samples.json").write_text('[{"prompt": "a", "teacher": "b", "student": "c", "same": 1, "tokens": 2}]')
    log_end(loggers, run_dir, RESULTS)
    _, whole, student = run.artifacts
    assert set(whole.manifest.entries) == files | {"metrics.csv", "samples.json"}
    assert (student.type, student.name, set(student.manifest.entries)) == ("model", "student-abc", {"config.json"})
    assert run.rows[-1]["samples"].data == [["a", "b", "c", 1]]
    logger = "{tensorboard: {}, _target_: lightning.pytorch.loggers.WandbLogger, model: false}"
    (run_dir / "config.yaml").write_text(f"logger: {logger}\n")
    log_end(loggers, run_dir, RESULTS)
    assert len(run.artifacts) == 4, "no student: its owner wants it here alone"


@pytest.mark.parametrize("asked", ["[wandb,tensorboard]", "[tensorboard,wandb]", "[csv,wandb,tensorboard]"])
def test_several_loggers_are_all_told(asked: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the words of the command line to what each has at the end; keys of W&B are W&B's alone."""
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config, _ = compose_config([f"logger={asked}", "logger.project=mine", "logger.tags=[a]"], run_dir)
    made: list[Json] = []
    loggers_of(plain(as_meant(config).logger), run_dir, made.append)
    kinds = {node["_target_"].rpartition(".")[2]: node for node in made}
    assert kinds.keys() == {"WandbLogger", "TensorBoardLogger"}, "metrics.csv is there anyway"
    assert (kinds["WandbLogger"]["project"], kinds["WandbLogger"]["tags"]) == ("mine", ["a"])
    assert not {"project", "tags"} & kinds["TensorBoardLogger"].keys()
    assert {node["save_dir"] for node in made} == {str(run_dir)}
    run, board = FakeRun(), TensorBoardLogger(str(run_dir), name=None, version="")
    loggers = [WandbLogger(experiment=run), board]
    log_start(loggers, run_dir)
    log_row(loggers, RESULTS[1], 3)
    log_end(loggers, run_dir, RESULTS)
    board.finalize("success")
    assert run.summary == summary(RESULTS)
    assert list(run_dir.glob("events.out.tfevents.*"))


def test_an_agents_sweep_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B's own agent makes a command line of docs/wandb/sweep.yaml, and it composes; the run takes the agent's id."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((CONF.parent / "docs" / "wandb" / "sweep.yaml").read_text())
    drawn = {"schedule.count": {"value": 4}, "block.ratio": {"value": 0.3}, "seed": {"value": 0}}
    assert drawn.keys() == sweep["parameters"].keys()
    words = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    command = [part if part != "${args_no_hyphens}" else words for part in sweep["command"]]
    assert command[2:5] == ["-m", "iskd", "train"]
    config, _ = compose_config([*command[5:-1], *words], tmp_path / "run")
    assert (config.schedule.count, config.block.ratio, config.logger.project) == (4, 0.3, "iskd")
    assert sweep["metric"]["name"] in SUMMARY
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    (logger,) = loggers_of({**plain(config.logger), "offline": True}, tmp_path, dict)
    assert logger["id"] == "agents"


class Described:
    """Stands in for any class of wandb-workspaces, which is no package of the lock: its name and what it was given."""

    seen: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *values: Any, **named: Any) -> Described:
        Described.seen.append((self.name, {**dict(enumerate(values)), **named}))
        return self


class Library(ModuleType):
    """A module in which every name is such a class."""

    def __getattr__(self, name: str) -> Described:
        return Described(name)


def test_the_saved_view_shows_what_runs_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/wandb/workspace.py describes it without a network; its names are those of metrics and of the summary."""
    for name in ("reports", "reports.v2", "workspaces"):
        monkeypatch.setitem(sys.modules, f"wandb_workspaces.{name}", Library(name))
    package = Library("wandb_workspaces")
    package.reports, package.workspaces = (
        sys.modules[f"wandb_workspaces.{name}"] for name in ("reports", "workspaces")
    )
    package.reports.v2 = sys.modules["wandb_workspaces.reports.v2"]
    monkeypatch.setitem(sys.modules, "wandb_workspaces", package)
    monkeypatch.setattr(Described, "seen", [])
    described = runpy.run_path(str(CONF.parent / "docs" / "wandb" / "workspace.py"))["workspace"]("me", "iskd")
    seen = Described.seen
    assert described.name == seen[-1][0] == "Workspace"
    assert (seen[-1][1]["entity"], seen[-1][1]["project"], len(seen[-1][1]["sections"])) == ("me", "iskd", 3)
    lines = [named for name, named in seen if name == "LinePlot"]
    assert {named["x"] for named in lines} == {X_AXIS}
    assert {y for named in lines for y in named["y"]} <= METRICS.keys()
    points = [named[axis] for name, named in seen if name == "ScatterPlot" for axis in ("x", "y")]
    points += [named[0] for name, named in seen if name == "SummaryMetric"]
    assert points
    assert set(points) <= SUMMARY.keys()
    (media,) = (named["media_keys"] for name, named in seen if name == "MediaBrowser")
    assert media == ["picture", "report"], "keys of log_end"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of that library, on import
def test_the_saved_view_is_one_of_the_librarys_own() -> None:
    """The classes of wandb-workspaces take what docs/wandb/workspace.py gives them, up to what is sent to W&B."""
    described = runpy.run_path(str(CONF.parent / "docs" / "wandb" / "workspace.py"))["workspace"]("me", "iskd")
    sent = described._to_model().model_dump_json()
    assert all(name in sent for name in ("final/retention", "val/kl", "Runs compared", "picture"))


@pytest.mark.slow
def test_what_an_agent_starts_is_a_run(tmp_path: Path) -> None:
    """The command of docs/wandb/sweep.yaml with drawn values, in a process of its own, on a tiny model and offline."""
    sweep = yaml.safe_load((CONF.parent / "docs" / "wandb" / "sweep.yaml").read_text())
    drawn = ["schedule.count=1", "block.ratio=0.3", "seed=0"]
    small = [
        "model=tiny",
        "data=sample",
        "schedule.tokens=1024",
        f"hydra.run.dir={tmp_path}/run",
        "run.efficiency_seconds=0",
    ]
    places = {"WANDB_MODE": "offline", "ISKD_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(CONF.parent)}
    done = subprocess.run(
        [sys.executable, *sweep["command"][2:-1], *drawn, *small],
        cwd=tmp_path, env={**os.environ, **places}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("variables", "netrc", "online"),
    [
        ({}, "", False),
        ({}, "machine api.wandb.ai login user password key", True),
        ({"WANDB_API_KEY": "key"}, "", True),
        ({"WANDB_BASE_URL": "https://wandb.mine.org"}, "machine api.wandb.ai login user password key", False),
        ({"WANDB_BASE_URL": "https://wandb.mine.org:8080"}, "machine wandb.mine.org:8080 login u password key", True),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "key"}, "", False),
        ({"WANDB_CONFIG_DIR": "{here}"}, "machine noted.org login u password key", True),
    ],
)
def test_wandb_is_online_where_it_has_a_key_for_its_server(
    variables: dict[str, str], netrc: str, online: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By NETRC and not only by the file at home; and where it is not, the log says so."""
    (tmp_path / "mine").write_text(netrc)
    (tmp_path / "settings").write_text("[default]\nbase_url = https://noted.org\n")
    place = {"WANDB_CONFIG_DIR": str(tmp_path / "none"), "WANDB_DIR": str(tmp_path), "NETRC": str(tmp_path / "mine")}
    given = {name: value.format(here=tmp_path) for name, value in variables.items()}
    assert chosen.online({**place, **given}) is online
    assert ("the run is offline" in caplog.text) is (not online and "WANDB_MODE" not in variables)


def test_a_resumed_run_is_the_same_and_marks_what_comes_again(run_dir: Path) -> None:
    first = tracked_as(run_dir)
    assert first == tracked_as(run_dir, "another")
    run = FakeRun()
    run.id = first
    for tokens in (0, 512):
        log_start([WandbLogger(experiment=run)], run_dir, tokens)
    assert run.rows == [{"tokens": float(at), "resumed_at": float(at)} for at in (0, 512)]
    assert run.config["resumed_at"] == [0, 512]
    for content in ("[", "[]", '{"wandb": "../x", "resumed_at": ["a", 3]}'):
        (run_dir / "tracking.json").write_text(content)
        assert tracked_as(run_dir, "mine") == "mine", "what anybody may have written names no place"


def test_an_offline_run_can_be_synced(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client without a network: the folder that `wandb sync RUN_DIR/wandb/offline-run-*` names."""
    import wandb

    for name, value in {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DATA_DIR", str(run_dir / "staged"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(run_dir / "cached"))
    name = tracked_as(run_dir)
    logger = WandbLogger(save_dir=str(run_dir), project="iskd", group="sweep", offline=True, id=name)
    try:
        log_start([logger], run_dir)
        for row in RESULTS:
            log_row([logger], row, row.index)
        log_end([logger], run_dir, RESULTS)
        assert logger.experiment.group == "sweep"
        written = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    (folder,) = (run_dir / "wandb").glob(f"offline-run-*-{name}")
    assert len(list(folder.glob("*.wandb"))) == 1
    media = {path.suffix for path in (folder / "files" / "media").rglob("*") if path.is_file()}
    assert media == {".png", ".html", ".json"}
    found = {name: value for name, value in written.items() if isinstance(value, int | float) and name[0] != "_"}
    assert found.keys() == SUMMARY.keys()
    assert found == pytest.approx(summary(RESULTS))


def test_tensorboard_gets_the_same(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(run_dir), name="tensorboard", version="", default_hp_metric=False)
    log_start([logger], run_dir)
    log_row([logger], RESULTS[1], 4)
    logger.finalize("success")
    log_end([logger], run_dir, RESULTS)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert {name: events.Scalars(name)[-1].value for name in SUMMARY} == pytest.approx(summary(RESULTS))
    assert "picture" in events.Tags()["images"]
    assert any("stages" in tag for tag in events.Tags()["tensors"])


def test_nothing_is_drawn_for_nobody(run_dir: Path) -> None:
    log_end([CSVLogger(str(run_dir))], run_dir, RESULTS)
    log_end([WandbLogger(experiment=FakeRun())], run_dir, RESULTS[3:])
    assert not (run_dir / "run.png").exists()


def test_runs_of_a_sweep_know_their_sweep(tmp_path: Path) -> None:
    for name, mode in (("alone", "RUN"), ("job", "MULTIRUN")):
        (tmp_path / "sweep" / name / ".hydra").mkdir(parents=True)
        (tmp_path / "sweep" / name / ".hydra" / "hydra.yaml").write_text(f"hydra:\n  mode: {mode}\n")
    assert sweep_of(tmp_path / "sweep" / "job") == "sweep"
    assert sweep_of(tmp_path / "sweep" / "alone") is None
    assert sweep_of(tmp_path / "sweep" / "new") is None
    (tmp_path / "sweep" / "multirun.yaml").write_text("{}")
    assert sweep_of(tmp_path / "sweep" / "new") == "sweep"


@pytest.mark.filterwarnings("ignore:The ``declarative_base\\(\\)`` function")  # Optuna calling SQLAlchemy
def test_two_objectives_give_a_pareto_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped sweeper and folder with a made-up job: Optuna asks, the answers are lists, the front is written."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    seen = []

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def job(config: Any) -> Any:
        seen.append(
            (
                list(config.objectives),
                config.schedule.count,
                config.block.ratio,
                sweep_of(Path(HydraConfig.get().runtime.output_dir)),
            )
        )
        results = [stage(0), stage(1, retention=1 - 0.05 * config.schedule.count, params=1000 - config.schedule.count)]
        return objectives(list(config.objectives))(results)

    monkeypatch.chdir(tmp_path)
    quiet = ["hydra/hydra_logging=none", "hydra/job_logging=none"]
    search = ["hydra/sweeper=pareto", "hydra.sweeper.n_trials=4", "schedule.count=range(1,3)"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *search, *quiet])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    before, HydraConfig.instance().cfg = HydraConfig.instance().cfg, None  # as in a fresh process
    GlobalHydra.instance().clear()
    job()
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = before
    (folder,) = (tmp_path / "runs").glob("*-iterative-sweep")
    assert [entry[0] for entry in seen] == [["retention", "params"]] * 4
    assert all(1 <= count <= 3 and 0.1 <= ratio <= 0.5 and sweep == folder.name for _, count, ratio, sweep in seen)
    found = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    best = {solution["params"]["schedule.count"]: solution["values"] for solution in found["solutions"]}
    assert best.keys() == {count for _, count, _, _ in seen}  # every count is on this front
    assert all(math.isclose(values[0], 1 - 0.05 * count) for count, values in best.items())


def test_samplers_and_grids_compose() -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    for sweep in ("pareto", "grid"):
        compose_config([f"hydra/sweeper={sweep}"], Path("unused"))
    compose_config(["hydra/sweeper=pareto", "hydra/sweeper/sampler=nsgaii"], Path("unused"))
    with pytest.raises(ValueError, match="hydra/sweeper/sampler"):
        compose_config(["hydra/sweeper=grid", "hydra/sweeper/sampler=nsgaii"], Path("unused"))

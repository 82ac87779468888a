"""conf/: every option composes, every `_target_` binds, every part has a yaml, every experiment runs."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from iskd.commands import build
from iskd.commands.arguments import arguments, literal_paths
from iskd.commands.build.folder import claim
from iskd.commands.build.tokens import default_tokens
from iskd.commands.resume import resumed
from iskd.commands.values.config import object_of, plain, spec
from iskd.plan.failure import read_failure
from iskd.plan.options import RunOptions
from iskd.schedules.align import Align
from iskd.schedules.edits import ConvertTo, ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.schedules.none import NoEdits
from iskd.schedules.oneshot import Oneshot
from iskd.system import precision, run_lock
from iskd.system.version import options
from iskd.teacher import load_teacher
from iskd.training import run
from iskd.training.step import OptimSpec
from tests.conf_defaults import FILES, mistakes, written
from tests.factories import CONF
from tests.runs import write_text

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
OPTIONS = [(group, option) for group in GROUPS for option in options(group)]
PREFIXES = ("iskd.", "lightning.")


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def composed(*overrides: str) -> DictConfig:
    config = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        config.name = str(config.name)
        del config["hydra"]
    return config


def override(group: str, option: str) -> str:
    return f"{group}=[{option}]" if group in ("loss", "refit") else f"{group}={option}"


@cache
def targets_of(group: str, option: str) -> list[Any]:
    """The nodes that make an object, of the config with one option in the place of the usual one."""
    return list(targets(composed(override(group, option))))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_every_target_binds(group: str, option: str) -> None:
    for node in targets_of(group, option):
        path = node["_target_"]
        assert path.startswith(PREFIXES), path
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        takes = found.from_block if hasattr(found, "from_block") else found
        parameters = inspect.signature(takes).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            unknown = set(node) - set(parameters) - {"_target_", "_recursive_", "weight"}
            assert not unknown, f"{path} does not take {unknown}"


@pytest.mark.parametrize("file", FILES, ids=[file.relative_to(CONF).as_posix() for file in FILES])
def test_a_yaml_decides_only_what_differs_from_the_code(file: Path) -> None:
    """Above '# defaults of the code' every value is another than the code's, below it every value is the code's."""
    assert mistakes(file.read_text(encoding="utf-8")) == []


def test_the_defaults_of_the_code_are_written_into_a_yaml() -> None:
    text = (CONF / "schedule" / "iterative.yaml").read_text(encoding="utf-8")
    other = text.replace("per_stage: 1", "per_stage: 7").replace("lr: 1.0e-4", "lr: 7")
    first, second = mistakes(other)
    assert first.startswith(
        "per_stage: 7 is below '# defaults of ...' and not what iskd.schedules.iterative.Iterative says"
    )
    assert second.startswith("lr: 7 ")
    assert yaml.safe_load(written(other)) == yaml.safe_load(text)
    assert [line.partition("#")[2] for line in written(other).splitlines()] == [
        line.partition("#")[2] for line in text.splitlines()
    ], "comments stay"
    [told] = mistakes(re.sub(r"^count: 4.*\n", "\\g<0>seed: 0\n", text, flags=re.MULTILINE))
    assert told.startswith("seed: 0 is the default of iskd.schedules.iterative.Iterative: drop it, or move it")
    [told] = mistakes(text + "kount: 4\n")
    assert told.endswith("move it up: it has no default there")


def test_a_run_made_by_hand_is_the_one_of_the_command_line() -> None:
    """On a CPU: how much is trained where nobody says follows the machine (tests/commands/test_token_budget.py)."""
    config = on_a_cpu(composed())
    assert RunOptions(**plain(config.run)) == RunOptions()
    assert object_of(config.optim) == OptimSpec()
    edit = ReplaceWith(spec(config.block))
    assert object_of(config.schedule, edit=edit, seed=0) == Iterative(edit, count=4)
    assert object_of(on_a_cpu(composed("schedule=oneshot")).schedule, edit=edit) == Oneshot(edit, count=4)
    assert object_of(on_a_cpu(composed("schedule=none")).schedule) == NoEdits()
    convert = ConvertTo(spec(config.mixer))
    assert object_of(on_a_cpu(composed("schedule=align")).schedule, edit=convert) == Align(convert)


def on_a_cpu(config: DictConfig) -> DictConfig:
    config.trainer.accelerator = "cpu"
    assert "32,768" in default_tokens(config, None)  # type: ignore[arg-type]
    return config


def targets(node: Any) -> Iterator[dict[str, Any]]:
    """Every node with a `_target_`, values unresolved."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield OmegaConf.to_container(node, resolve=False)  # type: ignore[misc]
        for key in node:
            if not OmegaConf.is_missing(node, key):
                yield from targets(node._get_node(key))


# what the parts of a shelf have in common; no yaml names them
SHARED = {"__init__", "base"}
SHARED |= {"chunk_size", "chunk_walk", "chunked", "scratch", "topk_kl"}  # losses
SHARED |= {"choosing", "fitting", "merge", "regression", "ridge", "slicing", "small_decoder"}  # blocks
SHARED |= {"noise", "sweep"}  # importance
SHARED |= {"carrying_out", "reading", "head_sums", "projections", "solved", "streams", "walk"}  # refits
SHARED |= {"layerwise", "orders", "settings", "stages_ahead", "target"}  # schedules
SHARED |= {"delta"}  # mixers


def test_every_part_has_a_yaml() -> None:
    named = {node["_target_"] for group, option in OPTIONS for node in targets_of(group, option)}
    for kind in ("blocks", "mixers", "refits", "importance", "losses", "schedules"):
        for file in (CONF.parent / "iskd" / kind).glob("*.py"):
            module = f"iskd.{kind}.{file.stem}"
            assert file.stem in SHARED or any(target.startswith(f"{module}.") for target in named), (
                f"{module} has no yaml"
            )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the text of all experiments is cut into tokens once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_runs_on_a_tiny_model(name: str, cache: Path, tmp_path: Path) -> None:
    """The preset as it is, on a tiny model and a tiny budget: model, data, sizes and device are all that changes."""
    layers = 12 if name == "iskd_gpt2_paper" else 24 if name == "iskd_phi1_paper" else 12
    overrides = [f"experiment={name}", f"cache_dir={cache}", "export=false", "trainer.progress=false"]
    overrides += [
        "model=tiny",
        f"model.num_layers={layers}",
        "model.hidden_size=48",
        "model.num_heads=4",
        "data=docstrings",
    ]
    overrides += ["data.seq_len=32", "data.batch_size=2", "data.val_tokens=512", "data.source.max_documents=200"]
    overrides += ["schedule.tokens=768", "run.fit_tokens=64", "run.score_tokens=64", "run.measure_before=false"]
    overrides += ["run.efficiency_seconds=0", "run.samples=0", "run.mfu=false"]
    overrides += ["refit.output.tokens=64", "refit.output.held_tokens=32"] if name in ("width", "budget") else []
    overrides += ["trainer.accelerator=cpu"] if name.startswith("gpu_") else []
    overrides += ["schedule.epochs=null"] if name.startswith("iskd_") else []
    # the tasks that choose layers are not at hand, and a step of 256 windows is no tiny budget
    overrides += ["importance=ablation", "trainer.accumulate_grad_batches=1"] if name == "ild_paper" else []
    if name == "budget":
        overrides += ["budget.params=0.7", "budget.use=[remove]", "budget.fit_tokens=64", "budget.held_tokens=32"]
        overrides += ["budget.score_tokens=64", "budget.rounds=0", "budget.pairs=0"]
    config = composed(*overrides)
    removals = config.schedule.get("target_layers") is not None
    if removals:
        config.schedule.target_layers = layers - 4
    result = run(build.parts(config, tmp_path / "run"))
    expected = {"finetune": 0, "iskd_gpt2_paper": 6, "iskd_phi1_paper": 12}
    expected |= dict.fromkeys(("l1", "width", "subquadratic", "subquadratic_paper", "local_first"), layers) | {
        "budget": 4
    }
    expected_edits = expected.get(name, 11)
    assert len(result.record.edits) == (4 if removals else expected_edits)
    assert result.final.tokens > 0


def test_resume_takes_the_saved_config_and_refuses_changes(tmp_path: Path) -> None:
    saved = composed("debug=smoke", "seed=7")
    OmegaConf.save(OmegaConf.create(plain(saved)), tmp_path / "config.yaml")
    again = composed(f"resume={tmp_path}")
    assert resumed(again, [f"resume={tmp_path}"]).seed == 7
    changed = composed(f"resume={tmp_path}", "schedule.lr=0.5", "seed=0")
    assert resumed(composed(f"resume={tmp_path}", "seed=7"), ["seed=7"]).schedule.count == 2
    with pytest.raises(ValueError, match=r"changes schedule\.lr: 0\.0001 -> 0\.5, seed: 7 -> 0; drop"):
        resumed(changed, ["seed=0", "schedule.lr=0.5"])
    with pytest.raises(ValueError, match=r"changes .*loss\.ce\..*: .* -> .*; drop that"):
        resumed(composed(f"resume={tmp_path}", "experiment=kd"), ["experiment=kd"])
    moved = composed(f"resume={tmp_path}", "cache_dir=elsewhere", "trainer.progress=false")
    assert resumed(moved, ["cache_dir=elsewhere"]).cache_dir == "elsewhere"
    later = composed(f"resume={tmp_path}", "export=false")
    assert resumed(later, ["export=false"]).export is False, "a run may write its student later, or not"
    with pytest.raises(ValueError, match=r"no config\.yaml in there"):
        resumed(composed(f"resume={tmp_path}/none"), [])
    lost = {key: value for key, value in plain(saved).items() if key != "schedule"}
    OmegaConf.save(OmegaConf.create(lost), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"config\.yaml has no schedule, without which there is no run"):
        build.parts(resumed(again, []), tmp_path)


def test_resume_keeps_what_the_run_was_started_with(tmp_path: Path) -> None:
    """Tasks, loggers, progress and cache are not asked for again; what a command line names takes their place."""
    run, cache = f"resume={tmp_path}", tmp_path / "cache"
    cache.mkdir()
    asked = ["eval=quick", "eval.tasks=[copy]", "eval.every=stage", "logger=[wandb,tensorboard]", f"cache_dir={cache}"]
    saved = composed(*literal_paths(asked), "debug=smoke", "trainer.progress=false")
    OmegaConf.save(OmegaConf.create(plain(saved)), tmp_path / "config.yaml")
    again = resumed(composed(run), [run])
    for key in ("eval", "logger", "cache_dir"):
        assert again[key] == saved[key], key
    assert (again.eval.every, again.trainer.progress) == ("stage", False)
    for override, group, value in (("eval=validation", "eval", []), ("logger=csv", "logger", None)):
        named = resumed(composed(run, override), [run, override])
        assert named[group].get("tasks") == value, override
        assert named.trainer.progress is False
    assert resumed(composed(run, "trainer.progress=true"), [run, "trainer.progress=true"]).trainer.progress is True
    assert resumed(composed(run, "eval=[]"), [run, "eval=[]"]).eval is None
    cache.rmdir()
    assert resumed(composed(run), [run]).cache_dir is None, "a folder of another machine"
    OmegaConf.update(saved, "logger.host", "elsewhere", force_add=True)
    OmegaConf.save(OmegaConf.create(plain(saved)), tmp_path / "config.yaml")
    assert not resumed(composed(run), [run]).logger, "not as any of conf/logger"


@pytest.mark.parametrize("value", ["gguf", "none", "off"])
def test_an_export_that_is_none_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"export={value}: choose hf"):
        build.parts(composed("debug=smoke", f"export={value}", f"cache_dir={tmp_path}/cache"), tmp_path / "run")


def test_a_run_is_not_asked_about_the_text_it_trains_on(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    asked = ["debug=smoke", "data=text", f"data.path={text}", "eval=quick", "eval.tasks=[copy]", f"eval.text={text}"]
    with pytest.raises(ValueError, match="text that it never sees"):
        build.parts(composed(*asked, "export=hf", f"cache_dir={tmp_path}/cache"), tmp_path / "run")


@pytest.mark.parametrize(("group", "name", "key"), [("mixer", "sliding", "sinks"), ("model", "smollm2", "config")])
def test_a_run_made_before_a_key_goes_on_by_its_command(group: str, name: str, key: str, tmp_path: Path) -> None:
    """The yaml of today gives the key a value that is not the code's: naming the part does not ask for it."""
    command = [f"{group}={name}", "debug=smoke"] if group == "mixer" else [f"{group}={name}"]
    config = composed(f"resume={tmp_path}", *command)
    saved = plain(config)
    del saved[group][key]
    OmegaConf.save(OmegaConf.create(saved), tmp_path / "config.yaml")
    assert key not in resumed(config, command)[group], "what the code does without it, as when it was made"
    if group == "mixer":
        same, other = (composed(f"resume={tmp_path}", *command, f"mixer.sinks={number}") for number in (0, 4))
        assert resumed(same, [*command, "mixer.sinks=0"]).mixer.window == 64
        with pytest.raises(ValueError, match=r"changes mixer\.sinks: 0 -> 4; drop"):
            resumed(other, [*command, "mixer.sinks=4"])
        with pytest.raises(ValueError, match=r"changes mixer\._target_: "):
            resumed(composed(f"resume={tmp_path}", "mixer=gla"), ["mixer=gla"])


def test_resume_may_lay_the_batches_out_anew(tmp_path: Path) -> None:
    """Another preset of the trainer, another micro-batch, other upkeep; nothing that changes a number."""
    saved = composed("debug=smoke", "seed=7", "trainer.progress=false")
    OmegaConf.save(OmegaConf.create(plain(saved)), tmp_path / "config.yaml")
    overrides = ["trainer=ddp", "trainer.devices=2", "data.batch_size=2", "run.keep=5", "schedule.restart_at_edit=true"]
    config = resumed(composed(f"resume={tmp_path}", "debug=smoke", *overrides), overrides)
    assert (config.trainer.strategy, config.trainer.devices, config.data.batch_size) == ("ddp", 2, 2)
    assert (config.run.keep, config.schedule.restart_at_edit, config.seed) == (5, True, 7)
    with pytest.raises(ValueError, match=r"changes trainer\.accelerator: 'auto' -> 'cpu'"):
        resumed(composed(f"resume={tmp_path}", "trainer=cpu"), ["trainer=cpu"])


def test_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(ValueError, match="holds another run"):
        build.parts(composed("debug=smoke"), tmp_path)
    assert not (tmp_path / "failure.json").exists(), "it is not this run's to write in"


def test_a_mistyped_value_takes_no_folder(tmp_path: Path) -> None:
    """A part that is refused leaves no config; what is refused later leaves one that the corrected command replaces."""
    file, lock = tmp_path / "config.yaml", tmp_path / "run.lock"
    asked = ["debug=smoke", "model=tiny", "export=false"]
    with pytest.raises(ValueError, match=r"edit=\[\] chooses nothing"):
        build.parts(composed(*asked, "edit=[]"), tmp_path)
    for wrong in ("optim.decay_over=epoch", "teacher.cache=nope", "run.max_shard_bytes=5XB"):
        with pytest.raises(ValueError, match=wrong.split(".")[1].split("=")[0]):
            build.parts(composed(*asked, wrong), tmp_path)
        assert not file.exists()
        assert (read_failure(tmp_path) or "").startswith("ValueError: "), wrong
        assert run_lock.hold(lock), "this process lives on"
        run_lock.release(lock)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(plain(composed(*asked, "seed=5")))))
    for work in ("stages.json", "record.json", "model", "checkpoints/000001-stage"):
        (tmp_path / work).mkdir(parents=True)
        with pytest.raises(ValueError, match="holds another run"):
            claim(tmp_path, resuming=False)
        run_lock.release(lock)
        (tmp_path / work).rmdir()
    claim(tmp_path, resuming=False)
    with pytest.raises(ValueError, match="holds another run"):
        claim(tmp_path, resuming=False)  # by a run of this process that has come to no checkpoint yet
    run_lock.release(lock)
    run(build.parts(composed(*asked, "plan_only=true", f"cache_dir={tmp_path}/cache"), tmp_path))
    assert OmegaConf.load(file).seed == 0
    assert read_failure(tmp_path) is None


def test_resume_writes_into_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "config.yaml").touch()
    assert arguments(["seed=1"]) == ["seed=1"]
    assert arguments(["resume=runs/x"])[1:] == ["hydra.run.dir=runs/x", "hydra.output_subdir=null"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.count=0"], "nothing would be edited"),
        (["schedule.layers=[1,1]"], "lists layer 1 twice"),
        (["schedule.layers=[9]"], r"layers 0\.\.3"),
        (
            ["+schedule.flor=2"],
            r"schedule\.flor is no key \(did you mean floor\?\): drop it, or use one of .*count, .*floor",
        ),
        (["schedule.floor=2"], r"schedule\.floor must be in \(0, 1\]"),
        (["block.ratio=1.5"], r"block\.ratio=1\.5 must be .*at most 1"),
        (["block=bottleneck", "block.reduction=7"], r"block\.reduction=7 does not divide"),
        (["data.seq_len=4096"], "longer than the model's context"),
        (["loss.kl.weight=-1"], r"loss\.kl\.weight"),
        (["optim.decay=steep"], r"optim\.decay"),
        (["data=text", "data.path=nowhere.txt"], "nowhere.txt"),
        (["data.val_path=x.txt"], "set data.path"),
    ],
)
def test_bad_values_are_refused_before_training(overrides: list[str], message: str, tmp_path: Path) -> None:
    base = ["debug=smoke", "trainer.progress=false", f"cache_dir={tmp_path}/cache", "export=false"]
    if "data=text" in overrides:
        base[0] = "model=tiny"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(build.parts(composed(*base, *overrides), tmp_path / "run"))


def test_the_offline_advice_works(tmp_path: Path) -> None:
    """What the error for a missing model suggests, for every model that knows its shape."""
    for model in ("smollm2", "gpt2"):
        advice = [f"model={model}", "model.pretrained=false", "model.num_layers=4"]
        loaded = load_teacher(object_of(composed(*advice).model))
        assert loaded.model.config.num_hidden_layers == 4


def test_wandb_is_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    base = ["debug=smoke", "trainer.progress=false", f"cache_dir={tmp_path}/cache", "export=false", "logger=wandb"]
    result = run(build.parts(composed(*base, "schedule.tokens=512"), tmp_path / "run"))
    files = list((result.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1


def test_precision_is_chosen_or_refused() -> None:
    with pytest.raises(ValueError, match="fp16 overflows"):
        precision.precision("16-mixed", "cpu")
    assert precision.precision("32-true", "cpu") == "32-true"
    assert precision.precision("auto", "cpu") == ("bf16-mixed" if precision.fast_bf16() else "32-true")

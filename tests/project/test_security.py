"""Laws of loading: nothing is unpickled, imported or run because a file asks for it; nothing grows without bound."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, PreTrainedModel

import iskd
from iskd.commands import build, train
from iskd.commands.arguments import arguments
from iskd.commands.build import parts
from iskd.commands.evaluate import evaluation
from iskd.commands.resume import resumed
from iskd.evaluation.tasks.task_items import read_task
from iskd.export import tokenizer_of
from iskd.export.card import _settings as card_settings
from iskd.export.probe import _CHILD, ask, differences, reopen
from iskd.export.probe import _paths as import_paths
from iskd.export.student import write
from iskd.export.write import export
from iskd.importance.task_accuracy import _load as named_tokenizer
from iskd.models import surgery
from iskd.models.tokenizers import byte_tokenizer, load_tokenizer
from iskd.models.weights import weight_files
from iskd.plan import Record, Remove, Replace, Spec, Stage, edits, run_files, to_json
from iskd.plan.reading import record_from_json
from iskd.report.read_run import read_run
from iskd.report.run_list import read_runs
from iskd.teacher import TeacherSpec, load_teacher
from iskd.teacher.origin import find_teacher
from iskd.teacher.row_store import RowStore
from iskd.training.metrics import sweep_of
from iskd.training.metrics.loggers import _config as logged_config
from iskd.training.state import RunState, resuming
from iskd.training.state.checkpoint_files import newest
from iskd.training.state.resuming import config_digest
from tests.factories import tiny
from tests.fuzz_kinds import RUN_FILES, SHARES
from tests.fuzz_readers import NOTES
from tests.run_folders import write_run

ROOT = Path(__file__).resolve().parents[2]
LOGGERS = "lightning.pytorch.loggers"
EVAL = {"_target_": "iskd.evaluation.EvalSpec", "tasks": ["copy"]}
FILES = [*sorted((ROOT / "iskd").rglob("*.py")), ROOT / "train.py"]
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
# Calls that make code or objects out of what a file says, by their last two names.
MAKERS = {"torch.load", "jit.load", "hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# What imports a module by name: a record (the allow-list says what it may), names and commands of this package, and the
# loggers, which are the command line's and never a saved config's.
IMPORTERS = {"iskd/plan/edits.py", "iskd/__init__.py", "iskd/__main__.py", "iskd/training/metrics/chosen.py"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call of the package: where, the node, the called name."""
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node, ast.unparse(node.func)


def test_no_module_imports_a_pickle() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}" for name in names if name.split(".")[0] in PICKLES]
    assert not wrong


def test_no_call_makes_code_or_objects_out_of_a_file() -> None:
    wrong = []
    for where, node, name in calls():
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        importer = name.split(".")[-1] == "import_module" and where.split(":")[0] not in IMPORTERS
        bad = name in BUILTINS or ".".join(name.split(".")[-2:]) in MAKERS or importer
        if bad or keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
            wrong.append(f"{where}: {name}")
    assert not wrong


def test_remote_code_is_off_or_what_the_user_said() -> None:
    """Every call that could run code from beside the weights says so itself; it is false or the user's own setting."""
    said = set()
    for where, node, name in calls():
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if "trust_remote_code" in keywords:
            handed_on = where.startswith("iskd/models/tokenizers.py")  # False where no caller says otherwise
            users = ("trust_remote_code",) if handed_on else ("spec.trust_remote_code",)
            assert keywords["trust_remote_code"] in ("False", *users), f"{where}: {name}"
            said.add(where.split(":")[0])
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                        assert ast.unparse(value) == "False", f"{path.name}:{node.lineno}"
    assert "iskd/teacher/load.py" in said
    assert inspect.signature(load_tokenizer).parameters["trust_remote_code"].default is False
    assert not TeacherSpec("any").trust_remote_code


def test_a_safetensors_file_is_the_only_kind_of_weights(tmp_path: Path) -> None:
    model, record = student()
    write(tmp_path, model, record, tiny("llama").config)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing beside it"):
        iskd.load(tmp_path)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle and never loaded"):
        load_teacher(TeacherSpec("local", path=str(tmp_path)))


SENTINEL_CODE = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("code beside the weights was run")
(Path({sentinel!r})).write_text("code beside the weights was run")
from transformers import PreTrainedConfig, LlamaForCausalLM
class Config(PreTrainedConfig):
    model_type = {kind!r}
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("kind", ["llama", "a_model_of_my_own"])
def test_code_beside_the_weights_runs_only_when_asked(kind: str, tmp_path: Path) -> None:
    folder, sentinel = tmp_path / "teacher", tmp_path / "sentinel"
    tiny("llama", vocab=300).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "custom.py").write_text(SENTINEL_CODE.format(sentinel=str(sentinel), kind=kind))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    spec = TeacherSpec("local", path=str(folder))
    if kind == "llama":
        assert type(load_teacher(spec).model).__module__.startswith("transformers.")
        assert type(iskd.load(folder)).__module__.startswith("transformers.")
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_teacher(spec)
        with pytest.raises(ValueError, match="model_type is missing or unknown"):
            iskd.load(folder)
    assert not sentinel.exists()


# ---- what a student's config may ask for ----------------------------------------------------------------------------


def student(*edits: Remove | Replace) -> tuple[PreTrainedModel, Record]:
    model = tiny("llama")
    return model, surgery.apply(model, Record(4), edits or (Replace(1, Spec("iskd.blocks.linear.Linear")),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, record = student()
    write(tmp_path / "model", model, record, tiny("llama").config)
    return tmp_path / "model"


def forge(folder: Path, where: str, **values: Any) -> None:
    """Set keys of config.json, or of the object in it that `where` names."""
    data = json.loads((folder / "config.json").read_text())
    target = data
    for key in where.split(".") if where else ():
        target = target[int(key) if key.isdigit() else key]
    target.update(values)
    (folder / "config.json").write_text(json.dumps(data))


FORGED = [
    ("teacher", {"num_hidden_layers": 10**12}, "must be an integer in 1..10000"),
    ("teacher", {"num_hidden_layers": 10_000}, "the record is about 4 layers, its teacher has 10000"),
    ("teacher", {"hidden_size": 6 * 10**6}, "far more than its weights hold|cannot be loaded"),
    ("teacher", {"intermediate_size": 10**9}, "far more than its weights hold"),
    ("teacher", {"vocab_size": 10**12}, "far more than its weights hold|cannot be loaded"),
    ("teacher", {"num_labels": 10**9}, "a student has no num_labels"),
    ("teacher", {"attn_implementation": "someone/kernels"}, "a student has no attn_implementation"),
    ("teacher", {"quantization_config": {"quant_method": "gptq"}}, "a student has no quantization_config"),
    ("teacher", {"hidden_act": "os.system"}, "cannot be loaded"),
    ("teacher", {"dtype": "hub"}, "cannot be loaded"),
    ("teacher", {"model_type": "bert"}, "model_type is missing or unknown, got 'bert'"),
    ("", {"teacher": [1]}, "model_type is missing or unknown"),
    ("", {"record": {"num_layers": 10**12}}, "num_layers must be between 1 and 10000"),
    ("record.edits.0.block", {"target": "os.system"}, "outside the allow-list"),
    ("record.edits.0.block", {"target": "iskd.blocks.ridge.Ridge"}, "has no|cannot be loaded"),
    ("record.edits.0.block", {"kwargs": {"ridge": "x"}}, "cannot be"),
    ("record.edits.0.block", {"kwargs": {"depth": 1}}, "cannot be"),
    (
        "record.edits.0",
        {"block": {"target": "iskd.blocks.bottleneck.Bottleneck", "kwargs": {"layers": 10**6, "reduction": 2}}},
        "far more parameters than its weights hold|between 1 and 64",
    ),
]


@pytest.mark.parametrize(("where", "values", "message"), FORGED, ids=range(len(FORGED)))
def test_a_forged_config_is_refused(where: str, values: dict[str, Any], message: str, folder: Path) -> None:
    forge(folder, where, **values)
    with pytest.raises(ValueError, match=message):
        iskd.load(folder)


def test_a_forged_native_student_is_refused(tmp_path: Path) -> None:
    model, record = student(Remove(1))
    write(tmp_path, model, record, tiny("llama").config)
    forge(tmp_path, "", intermediate_size=10**9)
    with pytest.raises(ValueError, match="far more than its weights hold"):
        iskd.load(tmp_path)
    forge(tmp_path, "", intermediate_size=96)
    assert iskd.load(tmp_path).config.num_hidden_layers == 3
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(ValueError, match="adapter"):
        iskd.load(tmp_path)


def test_registering_is_watched_only_while_a_student_is_loaded(folder: Path) -> None:
    forge(folder, "teacher", intermediate_size=10**9)
    with pytest.raises(ValueError, match="far more"):
        iskd.load(folder)
    assert not torch.nn.modules.module._global_parameter_registration_hooks


def test_old_configs_name_code_on_the_hub_that_nobody_needs(folder: Path) -> None:
    """Phi's first configs carry an auto_map although transformers has the class."""
    forge(folder, "teacher", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), PreTrainedModel)


# ---- the other readers ----------------------------------------------------------------------------------------------


def test_a_record_cannot_make_a_student_larger_than_its_teacher() -> None:
    wide = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 1, "heads": 2_000, "layers": 8})
    record = Record(4).extended(Replace(layer, wide) for layer in range(4))
    with pytest.raises(ValueError, match="more parameters"):
        surgery.rebuild(tiny("qwen3"), record)


def test_a_block_that_cannot_be_made_is_named() -> None:
    for spec in (Spec("iskd.blocks.ridge.Ridge"), Spec("iskd.blocks.slim.Slim", {"ratio": "half"})):
        with pytest.raises(ValueError, match=re.escape(f"replace 2: {spec.target}")):
            surgery.rebuild(tiny("llama"), Record(4).extended([Replace(2, spec)]), "meta")


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "a/b.safetensors", 3, None, "x.bin"])
def test_an_index_names_files_beside_it_only(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="files beside it"):
        weight_files(tmp_path)


def test_a_report_survives_a_forged_record(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"num_layers": 10**12}))
    assert read_run(tmp_path).num_layers == 0
    (tmp_path / "record.json").write_text("[" * 100_000)
    assert "record.json is not valid JSON" in " ".join(read_run(tmp_path).notes)


def test_a_checkpoint_that_leads_elsewhere_is_skipped(tmp_path: Path) -> None:
    names = ("student.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
    target = tmp_path / "000001-stage"
    target.mkdir()
    for name in names:
        os.mkfifo(target / name)  # reading one would wait for ever
    (target / "manifest.json").write_text(json.dumps({"files": {n: {"bytes": 0, "sha256": ""} for n in names}}))
    (tmp_path / "1x-stage").mkdir()
    assert newest(tmp_path) is None


@pytest.mark.parametrize(
    "target", ["os.system", "iskd.training.state.checkpoint.os.remove", "iskd.training.state.checkpoint_files.prune"]
)
def test_a_resumed_config_names_classes_of_this_package_only(target: Any, tmp_path: Path) -> None:
    asked = OmegaConf.create({"resume": str(tmp_path), "model": {"_target_": "iskd.teacher.load.TeacherSpec"}})
    OmegaConf.save({"model": asked.model, "loss": {"kl": {"_target_": target}}}, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="which is no part of iskd"):
        resumed(asked, [])


def test_a_resumed_config_does_not_ask_for_remote_code_itself(tmp_path: Path) -> None:
    asked = OmegaConf.create({"resume": str(tmp_path), "model": {"trust_remote_code": False}})
    OmegaConf.save({"model": {"trust_remote_code": True}}, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"add model\.trust_remote_code=true"):
        resumed(asked, [])


def test_a_resumed_config_does_not_ask_for_tasks_with_code_itself(tmp_path: Path) -> None:
    """A yaml of lm-evaluation-harness may say `!function file.name`, of a file beside it."""
    kind = {"_target_": "iskd.evaluation.evaluator.EvalSpec"}
    own = {**kind, "tasks": ["mine"], "task_dir": "tasks"}
    asked = OmegaConf.create({"resume": str(tmp_path), "trainer": {"progress": True}, "eval": own})
    OmegaConf.save({"eval": {**kind, "tasks": ["mine"], "task_dir": str(tmp_path)}}, tmp_path / "config.yaml")
    with pytest.raises(
        ValueError, match=r"config\.yaml asks the tasks in eval\.task_dir=.*which may hold code; if you"
    ):
        resumed(asked, [])
    assert resumed(asked, ["eval.task_dir=tasks", "eval.tasks=[mine]"]).eval.task_dir == "tasks"
    OmegaConf.save({"eval": {**kind, "tasks": ["copy"], "task_dir": None}}, tmp_path / "config.yaml")
    assert resumed(asked, []).eval.tasks == ["copy"]


FOREIGN = {
    "true after it was checked": ({"model": {"trust_remote_code": "${trainer.progress}"}}, "holds no interpolation"),
    "a class after it was checked": (
        {"loss": {"x": {"_target_": "${oc.select:logger.x,iskd.plan.Spec}"}}},
        "interpolation",
    ),
    "resolved twice": ({"loss": {"x": {"_target_": "\\${logger.x}"}}}, "no escaped one either"),
    "the caller's secret": ({"name": "${oc.env:WANDB_API_KEY}"}, r"name holds '\$\{oc\.env:WANDB_API_KEY\}'"),
    "in a key": ({"loss": {"${name}": 1}}, "holds no interpolation"),
    "a logger of the caller's for something else": (
        {"block": {"_target_": f"{LOGGERS}.WandbLogger"}},
        "no part of iskd",
    ),
    "a logger for something else": ({"block": {"_target_": f"{LOGGERS}.CSVLogger"}}, "no part of iskd"),
    "nothing": ({"loss": {"x": {"_target_": "iskd.no.such.Class"}}}, "no part of iskd"),
    "a number for a group": ({"trainer": 5}, r"config\.yaml: trainer must hold keys and values, got 5: restore"),
    "nothing for a group": ({"model": None}, "model must hold keys and values, got None"),
    "text for a group": ({"data": "x"}, "data must hold keys and values, got 'x'"),
    "a list for a group": ({"loss": ["iskd.losses.kl.KL"]}, r"loss must hold keys and values, got \['iskd"),
    "text for one that may be null": ({"teacher": "x"}, "teacher must hold keys and values"),
    "a list of classes": (
        {"loss": {"x": {"_target_": ["iskd.losses.kl.KL"]}}},
        r"loss\.x\._target_=\['iskd.*must be",
    ),
    "a truth in words": ({"model": {"trust_remote_code": "no"}}, r"add model\.trust_remote_code=true"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_resumed_config_means_what_it_says(what: str, tmp_path: Path) -> None:
    values, message = FOREIGN[what]
    logger = {"_target_": f"{LOGGERS}.WandbLogger", "x": "joblib.load"}
    asked = OmegaConf.create({"resume": str(tmp_path), "trainer": {"progress": True}, "logger": logger})
    saved = {"trainer": {"progress": False}, "logger": logger, **values}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        resumed(asked, [])


def test_nothing_is_left_to_resolve_in_a_resumed_config(tmp_path: Path) -> None:
    """What was checked is what is used; the logger of this command line follows the saved run."""
    logger = {"_target_": f"{LOGGERS}.CSVLogger", "name": "${name}-${oc.env:ISKD_NONE,x}"}
    asked = OmegaConf.create({"resume": str(tmp_path), "name": "b", "logger": logger, "trainer": {"progress": True}})
    OmegaConf.save(
        {"name": "a", "trainer": {"progress": False}, "logger": {"_target_": "os.system"}}, tmp_path / "config.yaml"
    )
    final = resumed(asked, ["trainer.progress=true"])
    assert final.logger.name == "a-x"
    assert final.trainer.progress is True
    assert OmegaConf.to_container(final, resolve=False) == OmegaConf.to_container(final, resolve=True)
    asked.logger.name = "\\${oc.env:HOME}"  # of the caller, but resolving it once more would change it
    with pytest.raises(ValueError, match=r"logger\.name holds '\$\{oc\.env:HOME\}'"):
        resumed(asked, [])


def test_every_reader_of_a_run_refuses_an_interpolation(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("[]")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    OmegaConf.save({"model": {"name": "${oc.env:HOME}"}}, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="holds no interpolation"):
        find_teacher(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no interpolation"):
        evaluation(OmegaConf.create({"eval": EVAL, "model": {"path": str(tmp_path)}, "reference": None}), tmp_path)
    with pytest.raises(ValueError, match="holds no interpolation"):
        card_settings(tmp_path)
    with pytest.raises(ValueError, match="holds no interpolation"):
        logged_config(tmp_path)
    assert "config.yaml: model.name holds" in " ".join(read_runs([tmp_path])[1])


LOADERS = ("yaml.safe_load", "OmegaConf.load")


def test_no_other_file_of_the_package_reads_the_config_of_a_run() -> None:
    """YAML of unknown origin has one reader; the others read files of the package, and the head of a model card."""
    places = re.compile(r"\(?(?:CONF|TASK_FILES) / ")
    loads = [(where, ast.unparse(node.args[0])) for where, node, name in calls() if name in LOADERS]
    assert [(where, read) for where, read in loads if not places.match(read)] == []
    readers = {"iskd/teacher/origin.py", "iskd/evaluation/harness.py", "iskd/commands/build/schedule.py"}
    readers |= {"iskd/commands/line/steps.py", "iskd/commands/values/config.py"}
    readers |= {"iskd/training/profile/plan_ahead.py"}
    assert {where.split(":")[0] for where, _ in loads} == readers


def test_a_run_that_could_not_be_read_again_does_not_start(tmp_path: Path) -> None:
    config = OmegaConf.create({"resume": None, "data": {"path": "\\${x}"}})
    with pytest.raises(ValueError, match=r"this run: data\.path holds '\$\{x\}'"):
        parts(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- modules that lie in a downloaded folder -------------------------------------------------------------------------

TRAPS = ("torch", "json", "typing", "__future__", "numpy", "yaml", "hydra", "transformers", "pydantic", "antigravity")


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """A folder whose modules stand for well-known ones."""
    place = tmp_path / "downloaded"
    place.mkdir()
    for name in TRAPS:
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    return place


def test_a_student_is_reopened_away_from_what_lies_here(trapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, record = student()
    write(trapped / "model", model, record, tiny("llama").config)
    monkeypatch.chdir(trapped)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in a notebook
    assert not differences(ask(model), reopen(Path("model"), ask(model), native=False).probe)[0]
    assert not (trapped.parent / "ran").exists()


def test_a_package_of_the_user_here_is_found_by_the_reopened_student(trapped: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(trapped)
    monkeypatch.setattr(sys, "path", ["", "relative", *sys.path])
    monkeypatch.setattr(edits, "_ALLOWED", [*edits.allowed(), "mine."])
    assert str(trapped) not in import_paths()
    (trapped / "mine").mkdir()
    assert import_paths()[-1] == str(trapped)
    assert all(Path(place).is_absolute() for place in import_paths())


@pytest.mark.parametrize("safe", [True, False])
def test_a_fresh_process_finds_no_modules_where_it_starts(safe: bool, trapped: Path) -> None:
    """With PYTHONSAFEPATH, which Python 3.10 does not know, and without."""
    environment = train._ours(os.environ)
    if not safe:
        del environment["PYTHONSAFEPATH"]
    command = [*train._ENTRY, "--cfg=job", "--package=seed"]
    done = subprocess.run(command, cwd=trapped, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr
    assert not (trapped.parent / "ran").exists()


@pytest.mark.parametrize("module", ["iskd", "iskd.teacher"])
def test_python_m_finds_no_modules_where_it_starts(module: str, trapped: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", module, "--help"]
    done = subprocess.run(command, cwd=trapped, env=environment, capture_output=True, text=True, timeout=120)
    assert "usage: " in done.stdout + done.stderr
    assert not (trapped.parent / "ran").exists()


def test_python_m_finds_the_package_where_it_lies(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "iskd.system"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "iskd.system.__main__" in done.stderr, "found, but it is a room and no command"


def test_every_process_is_started_where_its_file_says() -> None:
    """A new place that starts processes has to think of the folder they start in."""
    starters = {where.split(":")[0] for where, _, name in calls() if name.startswith(("subprocess.", "os.exec"))}
    # the last asks git about the checkout that the package lies in
    assert starters == {"iskd/commands/train.py", "iskd/export/probe.py", "iskd/system/version.py"}


# ---- code beside a model: nobody is asked ----------------------------------------------------------------------------

LOADS = ("from_pretrained", "from_config", "load_dataset", "HFLM")


def test_every_load_says_whether_code_may_run() -> None:
    """Where nothing is said, transformers asks on the terminal."""
    child = [node for node in ast.walk(ast.parse(_CHILD)) if isinstance(node, ast.Call)]
    found = [*calls(), *(("probe", node, ast.unparse(node.func)) for node in child)]
    loads = [(where, node, name) for where, node, name in found if name.split(".")[-1] in LOADS]
    said = [where for where, node, _ in loads if any(word.arg == "trust_remote_code" for word in node.keywords)]
    # classes named there, and whoever comes there has said that he trusts the folder
    said += [where for where, *_ in loads if where.startswith("iskd/export/bundled.py")]
    assert [where for where, *_ in loads if where not in said] == []
    assert len(loads) >= 12


def test_nobody_is_asked_whether_code_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    code = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    values = {"model_type": "a_model_of_my_own", "auto_map": code | {"AutoTokenizer": ["custom.Tokenizer", None]}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokenizer", **values}))
    (tmp_path / "custom.py").write_text("raise SystemExit('code beside the weights was run')")
    (tmp_path / "model.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    whole = tiny("llama", vocab=300).config.to_dict()
    spec = TeacherSpec("random", path=str(tmp_path), pretrained=False, config=whole)
    for load in (
        lambda: load_teacher(spec),
        lambda: load_teacher(TeacherSpec("local", path=str(tmp_path))),
        lambda: load_teacher(dataclasses.replace(spec, config=None)),
        lambda: named_tokenizer(tmp_path),
        lambda: tokenizer_of(tmp_path),
        lambda: iskd.load(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"."):
            load()
    assert not asked


def test_records_survive_what_the_reader_checks() -> None:
    """The checks refuse nothing that this program writes."""
    stage = Stage("a", (Replace(0, Spec("iskd.blocks.slim.Slim", {"ratio": 0.5, "kv_groups": None})),), lr=1)
    record = Record(2).extended(stage.edits)
    assert record_from_json(json.loads(json.dumps(to_json(record)))) == record


# ---- ten thousand hostile files -------------------------------------------------------------------------------------


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the limits on memory and paths are read from /proc")


def fuzz(cases: int, seed: int = 0) -> str:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(cases), "--seed", str(seed)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2_000:]
    return done.stdout


def check_table(table: str, cases: int) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    counts = {kind: tuple(map(int, numbers)) for kind, *numbers in rows[1:]}
    assert set(counts) == {*SHARES, "all"}
    assert counts["all"][0] == cases
    for kind, (total, accepted, refused) in counts.items():
        assert accepted + refused == total, kind
        assert accepted, f"{kind}: not even a harmless change is taken"
        assert refused > total / 3, f"{kind}: hardly a change is noticed"


@LINUX
def test_hostile_files_are_taken_or_refused() -> None:
    check_table(fuzz(2_000), 2_000)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_thousand_hostile_files_are_taken_or_refused(seed: int) -> None:
    check_table(fuzz(10_000, seed), 10_000)


def test_every_file_of_a_run_that_is_read_is_attacked() -> None:
    named = {value for name, value in vars(run_files).items() if name.endswith("_FILE")}
    written_only = {run_files.PROFILE_FILE, run_files.REPORT_FILE, run_files.RUNS_FILE}
    written_only |= {run_files.PICTURE_FILE, run_files.STAGES_TABLE_FILE, run_files.RUNS_TABLE_FILE}
    written_only |= {run_files.LENGTHS_TABLE_FILE, run_files.RUNS_LENGTHS_FILE}
    of_other_kinds = {run_files.RECORD_FILE, run_files.STAGES_FILE}
    as_another = {run_files.KEPT_METRICS_FILE}  # read as METRICS_FILE is
    assert named - written_only - of_other_kinds - as_another == {*RUN_FILES, *NOTES} - {".hydra/hydra.yaml"}


def test_a_config_beyond_its_weights_makes_no_teacher(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama", vocab=257), byte_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_teacher(TeacherSpec("any", str(tmp_path))).model.config.num_hidden_layers == 4
    valid = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("num_hidden_layers", 200_000), ("num_hidden_layers", 4_000), ("intermediate_size", 10**9)):
        (tmp_path / "config.json").write_text(json.dumps({**valid, key: value, "layer_types": None}))
        with pytest.raises(ValueError, match=r"must be an integer in|far more|weights hold 4 layers"):
            load_teacher(TeacherSpec("any", str(tmp_path)))


SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
GIANTS = ({"hidden_size": 16_000}, {"intermediate_size": 10**9}, {"num_layers": 10_000}, {"num_layers": 10**9})


@pytest.mark.parametrize("sizes", GIANTS)
def test_random_weights_come_with_no_more_than_the_students(sizes: dict[str, int], tmp_path: Path) -> None:
    """A few bytes of a run's config name the sizes; a resumed run has a checkpoint, an export its weights."""
    model = tiny("llama", vocab=257)
    model.save_pretrained(tmp_path)
    within, config = weight_files(tmp_path), model.config.to_dict()
    spec = TeacherSpec("any", pretrained=False, config={key: config[key] for key in SHAPE})
    assert load_teacher(spec, within).source == load_teacher(spec).source
    with pytest.raises(ValueError, match=r"model\.config.*(far more|must be an integer in)"):
        load_teacher(dataclasses.replace(spec, **{**{"num_heads": 4, "num_kv_heads": 4}, **sizes}), within)


def test_an_edited_config_is_found_before_its_teacher_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(build.model, "load_teacher", lambda *given: asked.append(given))
    newest = tmp_path / "checkpoints" / "000001-boundary"
    (tmp_path / run_files.CONFIG_FILE).write_text("seed: 1\n")
    state = RunState(record=Record(4), identity={"config": config_digest(tmp_path)})
    monkeypatch.setattr(resuming.checkpoint_files, "newest", lambda root, **_: newest)
    monkeypatch.setattr(resuming.checkpoint, "read_state", lambda path: state)
    newest.mkdir(parents=True)
    (newest / "student.safetensors").touch()
    groups = ("model", "data", "edit", "schedule", "loss", "optim", "trainer", "run")
    model = {"_target_": "iskd.teacher.load.TeacherSpec", "name": "any"}
    config = OmegaConf.create({"resume": str(tmp_path), "seed": 1, **{key: {} for key in groups}})
    chosen_by = {"_target_": "iskd.importance.magnitude.Magnitude"}
    config.update({"model": model, "loss": {"x": {}}, "importance": chosen_by})
    with pytest.raises(AttributeError):  # of what stands for the teacher
        parts(config, tmp_path)
    assert [within for _, within in asked] == [[newest / "student.safetensors"]]
    (tmp_path / run_files.CONFIG_FILE).write_text("seed: 2\n")
    with pytest.raises(ValueError, match=r"config\.yaml is not the one"):
        parts(config, tmp_path)
    assert len(asked) == 1


def test_a_pipe_in_the_place_of_a_file_is_not_waited_at(tmp_path: Path) -> None:
    """Task items, a tokenizer, Hydra's note, rows of a teacher cache."""
    for name in ("piqa/eval.jsonl", "tokenizer.json", ".hydra/hydra.yaml", "00000.rows"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    assert sweep_of(tmp_path) is None
    store = RowStore(tmp_path, count=2, size=4, per_file=2)
    for read in (
        lambda: read_task("piqa", tmp_path),
        lambda: named_tokenizer(tmp_path),
        lambda: tokenizer_of(tmp_path),
        lambda: store.get(0),
        store.missing,
        lambda: store.put(0, b"rows"),
    ):
        with pytest.raises((ValueError, OSError), match=r"not a plain file|no local file"):
            read()


WAYS_OUT = ("checkpoints", "train.log", "tensorboard", "checkpoints/.draft-000001-stage", "model/inner/deep")


@pytest.mark.parametrize("name", [*WAYS_OUT, "tensorboard/version_0", ".hydra/config.yaml", "wandb/run-1"])
def test_nothing_is_written_through_a_link_of_a_run(name: str, tmp_path: Path, capsys: Any) -> None:
    """Nor while Hydra starts; the folder of the run, or one above it, may be a link."""
    run, outside = tmp_path / "above" / "run", tmp_path / "outside"
    (run / name).parent.mkdir(parents=True)
    (run / run_files.CONFIG_FILE).touch()
    outside.mkdir()
    (run / name).symlink_to(outside)
    again = ("resume=auto", f"hydra.run.dir={run}"), ("-m", "resume=auto", f"hydra.sweep.dir={run.parent}")
    for asked in ((f"resume={run}",), *again):
        with pytest.raises(SystemExit):
            arguments(asked)
        assert f"{run / name} is a link out of the folder of the run" in capsys.readouterr().err
    (run / name).unlink()
    (run / name).symlink_to(run / run_files.CONFIG_FILE)
    for link, target in ((tmp_path / "linked", run), (tmp_path / "higher", run.parent)):
        link.symlink_to(target)
    for place in (run, tmp_path / "linked", tmp_path / "higher" / "run"):
        assert arguments([f"resume={place}"])[1] == f"hydra.run.dir={place}"


@pytest.mark.parametrize("name", ["train.log", "tensorboard/version_0/events", "run.lock", "wandb/run-1/x"])
def test_a_pipe_or_a_socket_in_a_run_is_refused_before_anybody_opens_it(name: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / run_files.CONFIG_FILE).touch()
    for make in (os.mkfifo, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)):
        make(tmp_path / name)
        for asked in (f"resume={tmp_path}",), ("resume=auto", f"hydra.run.dir={tmp_path}"):
            with pytest.raises(SystemExit):
                arguments(asked)
            assert f"{tmp_path / name} is a pipe, a socket or a device" in capsys.readouterr().err
        (tmp_path / name).unlink()
    (tmp_path / ".hidden").mkdir()
    os.mkfifo(tmp_path / ".hidden" / "pipe")
    arguments([f"resume={tmp_path}"])
    if "/" not in name:
        (tmp_path / name).symlink_to(".hidden/pipe")
        with pytest.raises(SystemExit):
            arguments([f"resume={tmp_path}"])


def test_nothing_is_read_or_written_through_a_linked_folder(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    write_run(run)
    for name in (".hydra", "wandb/logs"):
        (run / name).mkdir(parents=True)
    (run / ".hydra" / "hydra.yaml").write_text("hydra:\n  mode: MULTIRUN\n")
    for name in ("config.json", "export.json"):
        (run / run_files.MODEL / name).write_text("{}")
    (run / "wandb" / "logs" / "debug-core.log").symlink_to(tmp_path / "log of its own")
    assert sweep_of(run) == tmp_path.name
    run_files.refuse_strange(run)
    for name in (".hydra", run_files.MODEL):
        (run / name).rename(outside)
        (run / name).symlink_to(outside)
        assert (sweep_of(run) is None) == (name == ".hydra")
        config = OmegaConf.create({"eval": EVAL, "model": {"path": str(run)}, "reference": None})
        with pytest.raises(ValueError, match=rf"{name} is a link out of the folder of the run"):
            evaluation(config, tmp_path)
        (run / name).unlink()
        outside.rename(run / name)


def test_a_draft_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    for name in (".model.draft", "model"):
        (tmp_path / name).symlink_to(tmp_path / "outside")
    model, record = student(Remove(1))
    export(tmp_path / "model", model, record, tiny("llama").config, verify=False)
    assert not (tmp_path / "model").is_symlink()
    assert not list((tmp_path / "outside").iterdir())


CANARIES = """
import os, pickle, sys, time
from pathlib import Path
from tests import fuzz
root = Path(sys.argv[1])
(root / "run").mkdir()
fuzz.SECONDS, fuzz.PATIENCE = 0.2, 0.5
guard = fuzz.Guard(root / "run")
(root / "run" / "link").symlink_to(root)
class Evil:
    def __reduce__(self): return (eval, ("1",))
evil = pickle.dumps(Evil())
fuzz.limit_memory()
def spin():
    while True: pass
deeds = dict(
    system=lambda: os.system("true"), fork=os.fork, evaluate=lambda: eval("1 + 1"), unpickle=lambda: pickle.loads(evil),
    imports=lambda: __import__("antigravity"), write=lambda: open(root / "outside", "w"),
    climb=lambda: open(root / "run" / ".." / "outside", "a"), link=lambda: open(root / "run" / "link" / "outside", "w"),
    remove=lambda: os.remove(root / "outside"), make=lambda: os.mkdir(root / "outside"), spin=spin,
    wait=lambda: time.sleep(9),
    memory=lambda: bytearray(4 << 30), error=lambda: {}["missing"], swallowed=lambda: swallow(),
)
def swallow():
    try: os.system("true")
    except Exception: return True
for name, deed in deeds.items():
    outcome = fuzz.run_case(guard, deed)
    assert isinstance(outcome, str), (name, outcome)
def refuse(): raise ValueError("no")
assert fuzz.run_case(guard, refuse) is False
assert fuzz.run_case(guard, lambda: (root / "run" / "inside").write_text("x") == 1) is True
assert not (root / "outside").exists()
fuzz.NASTY = ("x" * 20_000, [[0] * 50 for _ in range(50)])
for number in range(300):  # what is repeated again and again would fill the memory of whoever makes the case
    assert len(fuzz.changed(fuzz.random.Random(number), [[[0]]])) < 40 * fuzz.LARGEST
print("all noticed")
"""


@LINUX
def test_the_guard_notices_what_it_is_there_for(tmp_path: Path) -> None:
    """A reader that misbehaves on purpose, in every way, is caught each time."""
    command = [sys.executable, "-c", CANARIES, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all noticed\n", done.stdout + done.stderr

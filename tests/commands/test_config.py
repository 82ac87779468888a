"""Values of the wrong kind: read as meant where that is plain, else an error that names key, value and fix."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hydra.conf import HydraConf
from hydra.utils import get_object
from omegaconf import OmegaConf, open_dict

from iskd.__main__ import main
from iskd.commands.compose import compose_config
from iskd.commands.resume import resumed
from iskd.commands.values.config import (
    as_meant,
    object_of,
    plain,
    terms,
)
from iskd.commands.values.unread import refuse_unknown_of_hydra, refuse_unread_keys
from iskd.data import TextData, TextFiles
from iskd.losses import check_terms
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan.options import RunOptions
from iskd.plan.trainer_settings import trainer_settings
from iskd.schedules.edits import ConvertTo, RemoveLayers
from iskd.system.typed_values import read_value
from iskd.system.version import options
from tests.factories import CONF
from tests.runs import MIXER

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("experiment", "debug"))
OPTIONS = [(group, option) for group in GROUPS for option in options(group)]


def written(group: str, option: str) -> dict[str, Any]:
    """What the yaml of an option says, with those that it includes; interpolations and gaps filled."""
    values = yaml.safe_load((CONF / group / f"{option}.yaml").read_text(encoding="utf-8")) or {}
    included = [name for name in values.pop("defaults", []) if name != "_self_"]
    for name in included:
        values = merged(written(group, name), values)
    return {key: "given" if value == "???" else value for key, value in values.items()}


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, with the values of the second where both have some, as Hydra merges them."""
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)}
    return {**below, **above, **{key: merged(below[key], above[key]) for key in both}}


def leaves(node: dict[str, Any], place: str) -> Iterator[str]:
    """Keys below a node; the settings of adapters and of a model's own config are one value."""
    for key, value in node.items():
        if isinstance(value, dict) and key not in ("lora", "config"):
            yield from leaves(value, f"{place}.{key}")
        elif not key.startswith("_"):  # of Hydra
            yield f"{place}.{key}"


def resolved(group: str, option: str) -> dict[str, Any]:
    """The group as a run has it, with what has to be given and what it refers to."""
    values = written(group, option)
    if group == "data" and option == "hf":
        values["source"]["name"] = "a/b"
    if group == "data":
        values["path"] = "a.txt"
    around = {"data": {"seq_len": 512}} if group == "loss" else {}
    meant = as_meant(OmegaConf.create({**around, group: values}))
    assert as_meant(meant) == meant, "read once, it stays"
    return cast(dict[str, Any], plain(meant))


def with_value(config: dict[str, Any], key: str, value: Any) -> Any:
    """A copy with another value at a dotted key, which `as_meant` reads as it reads a config."""
    changed = copy.deepcopy(config)
    *above, last = key.split(".")
    node = changed
    for name in above:
        node = node[name]
    node[last] = value
    return changed


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_a_value_of_a_wrong_kind_is_refused_for_every_key_of_every_yaml(group: str, option: str) -> None:
    config = resolved(group, option)
    for key in leaves(config[group], group):
        mapping = key.endswith((".lora", ".config", ".max_time", ".mixers"))
        for wrong in ([[1]], math.nan, [1] if mapping else {"of": "another kind"}):
            with pytest.raises(ValueError, match=rf"{key}(\[0\])?="):  # or an element of the list
                as_meant(with_value(config, key, wrong))


# what these say, and which key says so in its yaml or in docs/
MEANINGFUL = {
    "schedule.count": {-1},  # every layer that is not protected
    "trainer.devices": {-1},  # all that there are
}
ZERO_IS_NONE = re.compile(
    r"loss\.\w+\.weight|(.*\.)?mixer\.(conv|sinks|window_dropout)|.*\.seed|eval\.fewshot|importance\.(cache_mb|penalty)|run\.keep_students"
    r"|budget\.(epochs|rounds|finalists|pairs)|optim\.(weight_decay|warmup|end|momentum)|block\.(fit_steps|ridge)|edit\.ridge|refit\.replaceme\.ridge|.*_share"
    r"|.*\.(tokens|\w+_tokens|\w+_fraction|efficiency_seconds|samples|protect_\w+|max_skipped|log_every_n_steps)"
)


def made(group: str, config: dict[str, Any], tmp_path: Path) -> None:
    """What a run makes of a group before it trains, as far as it needs no model."""
    node = OmegaConf.create(config)[group]
    if group == "loss":
        check_terms(terms(config[group]))
    elif group == "run":
        RunOptions(**config[group])
    elif group == "trainer":
        trainer_settings(config[group], config[group])
    elif group == "schedule":
        if node.get("tokens", 0) is None:
            del node["tokens"]  # a command asks its machine
        takes = getattr(get_object(node["_target_"]), "takes", ())
        edit: Any = ConvertTo(MIXER) if "Align" in node["_target_"] else RemoveLayers()
        object_of(node, **{name: {"edit": edit, "seed": 0}[name] for name in takes})
    elif group == "data":
        keys = {
            key: value
            for key, value in config[group].items()
            if key not in ("source", "sources", "chat") and "path" not in key
        }
        TextData(TextFiles("a.txt"), byte_tokenizer(), cache_dir=tmp_path, **keys)
    elif "_target_" in node and group in ("optim", "importance", "eval", "budget"):
        takes = getattr(get_object(node["_target_"]), "takes", ())
        object_of(node, **dict.fromkeys(takes))


@pytest.mark.parametrize(("group", "option"), [(group, option) for group, option in OPTIONS if group != "logger"])
def test_a_number_that_means_nothing_is_refused_by_name_before_anything_runs(
    group: str, option: str, tmp_path: Path
) -> None:
    config = resolved(group, option)
    for key in leaves(config[group], group):
        for wrong in (-1, 0, math.inf):
            changed = with_value(config, key, wrong)
            try:
                read = plain(as_meant(changed))
                for name in key.split("."):
                    read = read[name]
                if type(read) in (str, bool) or wrong in MEANINGFUL.get(key, ()):
                    continue
                if wrong == 0 and ZERO_IS_NONE.fullmatch(key):
                    continue
                made(group, plain(as_meant(changed)), tmp_path)
            except ValueError as error:
                assert key.rpartition(".")[2] in str(error), key  # noqa: PT017 - which of three calls raises is free
            else:
                raise AssertionError(f"{key}={wrong} is taken: say what it means, or refuse it")


def test_a_value_of_a_wrong_kind_is_refused_for_the_keys_of_no_group() -> None:
    values = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    for key in leaves({name: values[name] for name in values.keys() - {"defaults", "hydra"}}, "x"):
        changed = OmegaConf.create({})
        OmegaConf.update(changed, key.removeprefix("x."), [[1]], force_add=True)
        with pytest.raises(ValueError, match=rf"{key.removeprefix('x.')}=\[\[1\]\] must be "):
            as_meant(changed)


@pytest.mark.parametrize(
    ("hint", "value", "meant"),
    [
        *((int, text, 10_000) for text in ("10k", "10K", "10_000", "1e4", "0.01M", 1e4, "10000")),
        (int, "2M", 2_000_000),
        (int, "12e9", 12_000_000_000),
        (int, "-1", -1),
        (float, "1e-4", 1e-4),
        (float, 3, 3.0),
        (float, "2k", 2000.0),
        *((bool, text, True) for text in ("yes", "True", "on", True)),
        *((bool, text, False) for text in ("no", "off", False)),
        (str, 2024, "2024"),
        (int | str, "10k", "10k"),
        (int | None, None, None),
        (list[int], ["1k", 2.0], [1000, 2]),
    ],
)
def test_what_is_plain_is_read_as_meant(hint: Any, value: Any, meant: Any) -> None:
    read = read_value("key", value, hint)
    assert read == meant
    assert type(read) is type(meant)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        *((int, wrong) for wrong in (2.5, "2.5", "abc", "", "10kk", True, None, math.nan, math.inf, [4], {}, "1e999")),
        *((float, wrong) for wrong in ("abc", True, None, math.nan, "nan", [1.0])),
        *((bool, wrong) for wrong in (1, 0, "maybe", None, 1.0)),
        *((str, wrong) for wrong in (True, 2.5, None, ["a"])),
        (float | str, math.nan),
        (list[float | str], [math.inf]),
        (list[str], "copy"),
        (list[int], 3),
        (list[int], [1, "x"]),
    ],
)
def test_what_is_not_is_refused_by_name(hint: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^some\.key=.* must be "):
        read_value("some.key", value, hint)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"logger": {"project": "mine"}},
            "logger.project is a key of logger=wandb alone: add it, or leave the key out",
        ),
        ({"logger": {"foo": 1}}, "logger has no key 'foo'"),
        ({"logger": {"tensorboard": {"_target_": "a.B"}, "foo": 1}}, "logger has no key 'foo'"),
        ({"eval": {"fewshoot": 1}}, "did you mean eval.fewshot?"),
        ({"refit": {"output": {"foo": 1}}}, "refit has no key 'output.foo'"),
        ({"refit": {"output": {"ridge": 1}}}, "refit.output.ridge is a key of refit=output alone: add it"),
        ({"refit": {"output": {}}}, "refit.output={} is no part: choose refit=[output]"),
        ({"refit": {"output": 1}}, "refit.output=1 is no part: choose refit=[output]"),
        ({"loss": {"jsd": {"weight": 1}}}, "loss.jsd.weight is a key of loss=jsd alone: add it"),
        (
            {"block": {"_target_": "iskd.blocks.identity.Identity", "foo": 1}},
            "block.foo is no key: drop it; there are no",
        ),
    ],
)
def test_a_key_that_nothing_reads_is_refused_by_its_own_name(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        as_meant(OmegaConf.create(node))


@pytest.mark.parametrize(
    ("overrides", "group", "left"),
    [
        (["experiment=local_first", "refit=[output]"], "refit", {"output"}),
        (["experiment=local_first", "refit=[calibrate,output]"], "refit", {"calibrate", "output"}),
        (["experiment=ild_paper", "loss=[kl]"], "loss", {"kl"}),  # nor what the preset spells out
        (["experiment=ild_paper", "loss=[kl_sum]"], "loss", {"kl_sum"}),
        (["experiment=ild_paper", "loss=kl_sum"], "loss", {"kl_sum"}),
        (["experiment=ild_paper", "loss=['kl_sum',\"kl\"]"], "loss", {"kl_sum", "kl"}),
        (["experiment=ild_paper"], "loss", {"kl_sum", "hidden", "final"}),
    ],
)
def test_a_presets_keys_go_with_the_part_that_was_not_chosen(overrides: list[str], group: str, left: set[str]) -> None:
    config, _ = compose_config(overrides)
    assert set(as_meant(config)[group]) == left
    if len(overrides) < 2:
        return
    mine = compose_config([*overrides, f"+{group}.mine._target_=iskd.losses.kl_sum.FinalState"])[0]
    assert set(mine[group]) == {*left, "mine"}, "a part of one's own is no preset's"
    named = compose_config([*overrides, f"+{group}.hidden.weight=2"])[0]
    with pytest.raises(ValueError, match=rf"{group}(\.hidden\.weight is a key of loss=hidden| has no key)"):
        as_meant(named)


def test_loggers_below_another_are_read() -> None:
    below = {"tensorboard": {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}}
    for node in (below, {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "mine", **below}, {}, None):
        refuse_unread_keys(OmegaConf.create({"logger": node}))


@pytest.mark.parametrize("node", [{"logger": {"project": "mine"}}, {"eval": {"limit": 3}}])
def test_such_a_key_takes_nothing_from_a_run_that_is_continued(node: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is a key of .*: add"):
        resumed(OmegaConf.create({**node, "resume": "run"}), [])


@pytest.mark.parametrize(
    ("key", "refused"),
    [("foo", True), ("run.foo", True), ("job.config.foo", True), ("job.env_set.FOO", False), ("sweeper.foo", False)],
)
def test_a_key_that_hydra_does_not_read_is_refused_unless_a_value_refers_to_it(key: str, refused: bool) -> None:
    node = OmegaConf.structured(HydraConf(sweeper={"_target_": "a.B"}))  # of anybody's class: it says so itself
    refuse_unknown_of_hydra(OmegaConf.create(), node)
    with open_dict(node):
        OmegaConf.update(node, key, 1, force_add=True)
    for used in (f"${{hydra:{key}}}", f"a ${{hydra.{key}}}"):
        refuse_unknown_of_hydra(OmegaConf.create({"name": used}), node)
    with pytest.raises(ValueError, match=f"hydra.{key} is no key of Hydra's") if refused else nullcontext():
        refuse_unknown_of_hydra(OmegaConf.create({"name": "hydra"}), node)


COMMANDS = [
    # of Hydra: what composes no config, and values
    (["train", "nokey=3"], "nokey"),
    (["train", "modle=tiny"], r"no group or key 'modle' \(did you mean model\?\)"),
    (["train", "schedule.cout=3"], r"schedule has no key 'cout' \(did you mean schedule\.count\?\)"),
    (["train", "schedule.mixers_lr=3"], r"schedule\.mixers_lr is a key of schedule=align alone"),
    *(
        (["train", f"eval.metrics{given}"], r"eval\.metrics is a key of .*: add one of them")
        for given in (".a=b", "={a: b}")
    ),
    (["train", "+budget.params=0.5"], r"budget\.params is a key of budget=default alone: add it, or leave the key out"),
    (["train", "schedule=backwards"], "backwards"),
    (["train", "experiment=idl"], r"experiment has no choice 'idl' \(did you mean ild\?\); choose ablation_no_heal, "),
    (["train", "loss=[kll]"], r"loss has no choice 'kll' \(did you mean kl\?\)"),
    (["train", "model=smolm2"], r"did you mean smollm2\?\); a model of the hub by that very name is model=hub model\."),
    (["train", "+modle=tiny"], r"no group or key 'modle' \(did you mean model\?\)"),
    (["train", "+experiment.x=1"], "experiment takes a choice"),
    (["train", "+hydra.foo=1"], r"hydra\.foo is no key of Hydra's"),
    *((["train", f"+{key}=1"], rf"{key} is no key") for key in ("teacher.x", "profile.x", "data.x", "data.chat.x")),
    *((["train", f"+{key}=1"], rf"{key} is no key") for key in ("loss.kl.wieght", "mixer.x", "block.ratoi")),
    (["train", "logger=wandb", "+logger.projct=x"], r"logger\.projct is no key of .*\(did you mean project\?\)"),
    (["train", "logger=tensorboard", "+logger.x=1"], r"logger\.x is no key"),
    (["train", "--mutlirun"], r"there is no option --mutlirun \(did you mean --multirun\?\)"),
    (["train", "schedule.tokens=("], "quote the value"),
    (["train", "model=5"], "model=5"),
    (["train", "data.seq_len=[1"], r"data\.seq_len=\[1"),
    (["train", "data.seq_len"], r"data\.seq_len"),
    (["train", "loss=[]"], r"loss=\[\]"),
    (["train", "schedule.count=2.5"], r"schedule\.count=2\.5"),
    (["train", "trainer.precision=16"], r"trainer\.precision=16"),
    (["train", "schedule=null"], "schedule=null"),
    (["train", "name=${nothing}"], "nothing"),
    (["train", "resume=nowhere"], "nowhere"),
    (["train", "data=text"], r"set data\.path=FILE"),
    (["score", "run.score_tokens=many"], r"run\.score_tokens=many"),
    (["score", "importance=nobody"], "nobody"),
    (["evaluate", "eval.limit=some"], "which model"),
    (["evaluate", "model=tiny", "eval.limit=some"], r"eval\.limit=some"),
    (["evaluate", "model=no/such/folder"], "no/such/folder"),
    (["profile", "profile.steps=x"], r"profile\.steps=x"),
    # of folders
    (["report", "nowhere"], "nowhere"),
    (["report", "a.txt"], r"a\.txt"),
    (["report", "."], "run"),
    (["verify", "nowhere"], "nowhere"),
    (["verify", "a.txt"], r"a\.txt"),
    (["verify", "."], r"config\.json is missing"),
    (["generate", "nowhere", "once"], "nowhere"),
    (["generate", "a.txt", "once"], r"a\.txt"),
    (["generate", ".", "once", "--tokens", "many"], "many"),
    (["generate", ".", "once", "--tokens", "-1"], "-1"),
    (["generate", ".", "once", "--temperature", "nan"], "nan"),
    (["curve", "a.png", "nowhere"], "nowhere"),
    (["curve", "a.png", "a.txt"], r"a\.txt"),
    (["curve", "a.png"], r"required: \[NAME=\]RUN_DIR; see iskd curve --help"),
    (["report"], "required: folder"),
    (["verify"], "required: folder"),
    (["verify", ".", "--referense", "x"], r"no option --referense \(did you mean --reference\?\)"),
    (["generate", ".", "once", "upon"], "'upon' is one too many"),
    (["unheard"], "the commands are train, "),
    (["trian"], r"did you mean train\?"),
]


@pytest.mark.parametrize(("argv", "named"), COMMANDS, ids=[" ".join(argv) for argv, _ in COMMANDS])
def test_what_a_user_can_mend_is_a_sentence_and_exit_code_2(
    argv: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.txt").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ISKD_COMMAND", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    hydras = argv[0] in ("train", "score", "evaluate", "profile")
    smoke = ["debug=smoke", "trainer=cpu", "hydra.output_subdir=null", f"hydra.run.dir={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["iskd", argv[0], *(smoke if hydras else []), *argv[1:]])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr().err
    assert ended.value.code == 2, said
    assert re.search(named, said), said
    assert said.splitlines()[-1].startswith("error: "), "one sentence is one line"
    assert "Traceback" not in said
    assert "Error executing job" not in said, "Hydra says the same in its own way"


def test_tracebacks_stay_where_they_are_asked_for_and_for_bugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISKD_COMMAND", raising=False)
    argv = ["iskd", "score", "debug=smoke", "hydra.output_subdir=null", f"hydra.run.dir={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", [*argv, "run.score_tokens=x"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"run\.score_tokens=x"):
        main()
    monkeypatch.delenv("HYDRA_FULL_ERROR")

    def broken(_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("iskd.commands.score.importance_rows", broken)
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(KeyError, match="a bug"):
        main()

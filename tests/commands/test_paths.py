"""Paths that people have: in every key and argument that takes one, as they are."""

from __future__ import annotations

import random
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from iskd.commands import curve
from iskd.commands.arguments import arguments, literal_paths
from iskd.commands.compose import compose_config
from iskd.commands.compress import _source
from iskd.commands.line.parser import as_folder, dashed
from iskd.commands.resume import resumed
from iskd.commands.values.config import as_meant, new_folder
from iskd.commands.values.paths import assigned, at_fault, at_home, takes_path
from iskd.data.files.readers import find_files
from iskd.system.text import argument
from iskd.system.typed_values import takes
from iskd.system.version import options
from tests.factories import CONF

NAMES = (
    "two words", " in front", "behind ", "résumé", "日本語", "Ωмега", "a=b", "b (1)", "choice(1)",
    "[x]", "a[0]", "#1", "it's", "\"quoted\"", "'quoted'", "~", "~draft", "a~b", "a,b", "{x}", "{x",
    "$HOME", "$", "a;b", "a & b", "back\\slash", "end\\", "a\\'b", "a\\\\", "a\\=b", "-x",
    "--multirun", "@x", "100%", "a:b", "007", "1e5", "1_000", "a|b", "a*b?", "+x", "!x", "`x`",
)  # fmt: skip
ALL = 'it\'s é, a=b (1) [0] {x} $y ~z; & "q" \\ #'
KEYS = (
    "data.path", "data.val_path", "data.test_path", "data.source.path", "resume", "reference",
    "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "cache_dir", "eval.text",
    "eval.data_dir", "model.path", "importance.data_dir", "importance.tokenizer",
    "data.source.name", "+logger.save_dir", "++importance.file",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def read(*given: str) -> list[Any]:
    """What Hydra reads of arguments."""
    return [override.value() for override in OverridesParser.create().parse_overrides(list(given))]


def run_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    return folder


@pytest.mark.parametrize("there", [True, False], ids=["there", "new"])
def test_a_path_of_any_name_is_that_path(there: bool, tmp_path: Path) -> None:
    """As a name beside the command and below a folder, for a second reader too, as restarts are."""
    for name in NAMES:
        place = tmp_path / "in" / name
        if there:
            place.mkdir(parents=True)
        for given in (str(place), *([name] if name != "~" and name[0] not in "'\"" else [])):
            once = literal_paths([f"cache_dir={given}"])
            assert read(*once) == [given]
            assert literal_paths(once) == once


def test_every_key_that_takes_a_path_takes_any(tmp_path: Path) -> None:
    place = run_folder(tmp_path / ALL)
    for key in KEYS:
        for several in (True, False):
            assert read(*literal_paths([f"{key}={place}"], several=several)) == [str(place)], key
    assert read(*arguments([f"model={place}"])) == ["local", str(place)]
    assert read(*arguments([f"model='{tmp_path}'"])) == ["local", str(tmp_path)], "as Hydra is told elsewhere"
    assert literal_paths(["schedule.count=1", "name=a b", "~data.path", "data.path"])[1] == "name=a b"


def test_hydra_reads_any_text_that_is_assigned() -> None:
    draw = random.Random(0)
    for _ in range(150):
        text = "".join(draw.choices("\\'\"a ,=$", k=draw.randint(0, 9))).replace("${", "")
        assert read(assigned("key", text)) == [text]
    with pytest.raises(ValueError, match="rename it"):
        assigned("data.path", "a${b}")


def test_what_is_meant_as_grammar_stays(tmp_path: Path) -> None:
    for name in ("a", "b (1)", "c,d"):
        (tmp_path / name).mkdir()
    for given in ("", "null", "???", "${oc.env:HOME}/x", "'${name} x'", "a/*/x.txt", "'a b'", '"a b"', "plain/x.txt"):
        assert literal_paths([f"data.path={given}"]) == [f"data.path={given}"]
    (several,) = OverridesParser.create().parse_overrides(
        literal_paths(["data.path=~/x,b (1),c,d,'e f'"], several=True)
    )
    assert list(several.sweep_string_iterator()) == [f"'{tmp_path}/home/x'", "'b (1)'", "'c,d'", "'e f'"]
    for given in ("choice(a,b)", "glob(*)", "a,b"):
        assert literal_paths([f"data.path={given}"], several=True) == [f"data.path={given}"]
    assert read(*literal_paths(["data.path=x,y", "data.path=x\\ y", "data.path=[ab].txt"])) == [
        "x,y",
        "x\\ y",
        "[ab].txt",
    ]
    (tmp_path / "x y").touch()
    assert read(*literal_paths(["data.path=x\\ y"])) == ["x y"], "what Hydra's escapes name, where it is there"
    (tmp_path / "a${b}").touch()
    with pytest.raises(ValueError, match="rename it"):
        literal_paths(["data.path=a${b}"])


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line, quoted or not, from an interpolation, and from the environment."""
    home = f"{tmp_path}/home"
    assert read(*literal_paths(["data.path=~/x", "data.path='~/x y'", "resume=\"~\"", "hydra.run.dir=~/a b"])) == [
        f"{home}/x", f"{home}/x y", home, f"{home}/a b"
    ]  # fmt: skip
    assert read(*literal_paths(["data.path=~nobody-of-that-name/x"])) == ["~nobody-of-that-name/x"]
    monkeypatch.setenv("ISKD_CACHE", "~/cache")
    monkeypatch.setenv("TEXTS", "~/texts")
    config, _ = compose_config(["data=text", "data.path=${oc.env:TEXTS}/é.txt", "name='~x'"], tmp_path / "run")
    meant = as_meant(config)
    assert (meant.cache_dir, meant.data.path, meant.data.source.path) == (
        f"{home}/cache", f"{home}/texts/é.txt", f"{home}/texts/é.txt"
    )  # fmt: skip
    lists = {"importance": {"files": ["~/a", "b"]}}
    at_home(lists)
    assert (lists["importance"]["files"], meant.name) == ([f"{home}/a", "b"], "~x")
    for given, folder in {  # Hydra makes these before a config is read
        "hydra.run.dir=${oc.env:TEXTS}/a b (1)": f"{home}/texts/a b (1)",
        "hydra.run.dir='${cache_dir}/x'": f"{home}/cache/x",
        "hydra.run.dir=${oc.env:HOME}/it's": f"{home}/it's",
        'hydra.run.dir=${new_folder:"${oc.env:TEXTS}/n"}': f"{home}/texts/n",
    }.items():
        assert literal_paths(once := literal_paths([given])) == once
        assert compose_config([given])[1] == Path(folder), given


def test_a_composed_config_holds_the_paths(tmp_path: Path) -> None:
    place = str(run_folder(tmp_path / ALL))
    keys = ("data.path", "data.val_path", "cache_dir", "eval.text", "reference", "model.path")
    groups = ("data=text", "eval=quick", "model=local", f"hydra.run.dir={place}/run")
    config, folder = compose_config([*groups, *(f"{key}={place}" for key in keys)])
    meant = as_meant(config)
    assert [meant.data.path, meant.data.val_path, meant.data.source.path, meant.cache_dir, meant.eval.text] == [
        place
    ] * 5
    assert [meant.reference, meant.model.path, str(folder.parent)] == [place] * 3
    assert read(*_source(place)[1]) == ["text", place], "iskd.compress"


def test_what_a_run_says_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run_folder(tmp_path / "runs" / ALL)
    given = shlex.split(argument("resume", place))
    assert read(*arguments(given)) == [str(place), str(place), None]
    assert argument("resume", "/plain/run") == "resume=/plain/run"
    config, _ = compose_config(["resume=~/x y"], tmp_path / "new")
    with pytest.raises(ValueError, match=r"resume=.*x y.*: no config\.yaml in there") as error:
        resumed(config, [])
    assert shlex.split(str(error.value).rpartition(": no config")[0]) == [f"resume={tmp_path}/home/x y"]
    with pytest.raises(SystemExit):
        arguments(["resume='~/runs/x'"])
    assert "no config.yaml in there" in capsys.readouterr().err
    assert not (tmp_path / "home" / "runs").exists()
    assert not (tmp_path / "~").exists()


def test_a_glob_below_a_folder_with_brackets(tmp_path: Path) -> None:
    for name in ("[1]/a/x.txt", "[1]/b/x.txt", "1/a/x.txt", "[ab].txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert len(find_files(f"{tmp_path}/[1]/*/x.txt", "data.path")) == 2
    assert len(find_files("[1]/[ab]/x.txt", "data.path")) == 2
    assert find_files("[ab].txt", "data.path") == [Path("[ab].txt")]


def test_commands_without_overrides(tmp_path: Path) -> None:
    for name in ("-x", "-h", "a=b"):
        run_folder(tmp_path / name)
    parser = ArgumentParser()
    parser.add_argument("folder", nargs="+", type=as_folder)
    parser.add_argument("--reference", type=as_folder)
    asked = parser.parse_args(dashed(parser, ["-x", "~/y", "--reference", "-x"]))
    assert (asked.folder, asked.reference) == ([Path("-x"), tmp_path / "home" / "y"], Path("-x"))
    assert dashed(parser, ["-h", "--no", "z"]) == ["-h", "--no", "z"]
    assert curve._named("a=b") == (None, Path("a=b"))
    assert curve._named("n=a=b") == ("n", Path("a=b"))
    assert curve._named("n=nowhere") == ("n", Path("nowhere"))


def test_the_rule_knows_every_path_of_the_configs() -> None:
    """What a target takes as a path is one by its key's name, and no other key is."""
    found = set[str]()
    for group in ("importance", "eval", "data", "model"):
        for option in options(group):
            text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
            target = next((line.split()[-1] for line in text.splitlines() if "_target_:" in line), None)
            if target is not None and target.startswith("iskd."):
                module, _, name = target.rpartition(".")
                hints = takes(getattr(__import__(module, fromlist=[name]), name))
                prefix = f"{group}.source" if group == "data" else group
                found |= {f"{prefix}.{key}" for key, (hint, _) in hints.items() if "Path" in str(hint)}
    assert found, sys.modules
    assert all(map(takes_path, found)), found


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ("hydra.run.dir=a.txt", ""),
        ("hydra.run.dir=a.txt/x", " (PLACE/a.txt)"),
        ("hydra.sweep.dir='a.txt/x'", " (PLACE/a.txt)"),
        ("+cache_dir=a.txt", ""),
        ("data.path=.", " (PLACE/a.txt)"),
        ("seed=a.txt", None),
        ("data.path=b.txt", None),
        ("a.txt", None),
    ],
)
def test_a_path_that_cannot_be_used_is_told_with_its_key(
    given: str, where: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the system fails at it, on the way to it or in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(OSError, match="Not a directory") as failed:
        next(Path("a.txt").iterdir())
    said = at_fault(failed.value, ["seed=1", given, "resume=c"])
    key, _, value = given.lstrip("+").partition("=")
    named = f"{argument(key, value.strip(chr(39)))} cannot be used: Not a directory"
    assert said == ("" if where is None else f"{named}{where.replace('PLACE', str(tmp_path))}; name another place")
    for other in (OSError("in words of our own"), OSError(28, "No space left on device")):
        assert at_fault(other, [given]) == ""


def test_a_folder_for_runs_that_cannot_be_made_is_told_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(ValueError, match=r"no folder can be made at .*runs/now \(.*\): set hydra\.run\.dir=DIR"):
        new_folder(str(tmp_path / "runs" / "now"))

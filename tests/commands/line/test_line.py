"""The command line before a command runs: at once, with every command, group and main key, and what was meant."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from iskd.__main__ import main
from iskd.commands.compose import compose_config
from iskd.commands.line import parse, unknown_key
from iskd.commands.line.commands import COMMANDS
from iskd.commands.line.completion import words_for
from iskd.commands.line.helping import command_help, main_key, top_help
from iskd.commands.line.keys import about, choices, keys_of, known, root_keys
from iskd.commands.line.parser import _HYDRAS, parser_of
from iskd.commands.line.telling import _PLUGINS, in_own_words, one_sentence
from iskd.data import BOS
from iskd.system.version import command_line, commit, options
from tests.factories import CONF

ROOT = CONF.parent


def help_of(name: str, asked: Sequence[str] = ()) -> str:
    parser = parser_of(name)
    return command_help(name, parser.format_usage(), parser.known, asked)


LIGHT = """
import os, sys
sys.argv = ["iskd", *sys.argv[1:]]
from iskd.__main__ import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "hydra", "omegaconf", "numpy", "pydantic", "rich"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "words",
    [[], ["--help"], ["--version"], ["train", "--help"], ["report", "-h"], ["trian"], ["verify"], ["train", "--mutli"]],
    ids=" ".join,
)
def test_help_and_mistyped_words_need_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    """Half a second, of which Python takes a part: what is imported decides, on every machine alike."""
    script = tmp_path / "iskd"
    script.write_text(LIGHT)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script), *words], env=env, capture_output=True, text=True, timeout=60)
    bad = words in (["trian"], ["verify"], ["train", "--mutli"])
    assert done.returncode == (2 if bad else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "") if bad else (done.stderr, bool(done.stdout)) == ("", True)


def test_every_command_has_a_line_and_examples() -> None:
    listed = top_help()
    for name, command in COMMANDS.items():
        assert f"  {name}" in listed
        assert command.examples
        assert all(example.startswith("iskd ") or "$(iskd" in example for example in command.examples)
        place = ROOT / "iskd" / "commands" / name  # a file, or a room of its own
        assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file() or name == "completion"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its main keys stand in conf/ with a comment there; no line is wider than COLUMNS."""
    command = COMMANDS[name]
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = help_of(name)
        body = text.partition("\nexamples:")[0]
        assert max(map(len, body.splitlines())) <= columns
        assert f"usage: iskd {name}" in text
    for key in command.keys:
        found = main_key(key, command.chosen)
        assert found.about, f"{key} has no comment in conf/"
        assert f"  {key}={found.value}" in text
    for group in command.groups:
        assert choices()[group].about, f"{group} has no comment in conf/config.yaml"
        assert all(option in text for option in options(group))


def test_every_choice_says_what_it_is() -> None:
    assert [f"{group}={name}" for group in choices() for name in options(group) if not about(group, name)] == []
    text = help_of("train", ["schedule"])
    assert all(f"  {name} " in text for name in options("schedule"))
    text = help_of("train", ["data=text"])
    assert "data.path=null" in text
    assert "local copy of the data set" in text, "of the file that it includes"
    with pytest.raises(ValueError, match=r"did you mean schedule"):
        help_of("train", ["shcedule"])
    with pytest.raises(ValueError, match="choose bottleneck"):
        help_of("train", ["block=slimm"])


def test_keys_are_those_that_hydra_composes() -> None:
    """Read line by line, all keys of a yaml are found, those below others too."""
    assert keys_of("loss", "kl")["loss.kl.weight"].value == "1.0"
    assert {"data.source.max_documents", "data.seq_len", "data.chat.loss"} <= keys_of("data", "docstrings").keys()
    assert {"teacher.cache", "profile.steps", "export.dtype", "seed"} <= root_keys().keys()
    assert "trainer.strategy" in known("trainer")
    assert "trainer.strategy" not in keys_of("trainer", "auto")


def test_hydras_options_are_known() -> None:
    ours = {name: how for names, how in _HYDRAS for name in names}
    theirs = {name: action for action in get_args_parser()._actions for name in action.option_strings}
    assert theirs.keys() - ours.keys() == {"-h", "--help", "--version"}
    assert ours.keys() <= theirs.keys()
    for name, how in ours.items():
        assert (theirs[name].nargs == 0) == (how == {"action": "store_true"}), name
        assert list(theirs[name].choices or ()) == list(how.get("choices", ())), name
        assert (theirs[name].nargs == "?") == (how.get("nargs") == "?"), name
    assert parse(["a=1"], "train").command == "train", "a process that a launcher starts has no command"


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["a=1", "-m", "b=2"], {"multirun": True}),
        (["-m", "a=1", "b=2"], {"multirun": True}),
        (["a=1", "--cfg", "job", "b=2", "-p=x", "--resolve"], {"cfg": "job", "package": "x", "resolve": True}),
        (["a=1", "--info", "-cd", "x y", "b=2"], {"info": "all", "config_dir": "x y"}),
        (["--info", "config", "a=1", "b=2", "--config-name=z"], {"info": "config", "config_name": "z"}),
        (["a=1", "b=2", "--info"], {"info": "all"}),
        (["a=1", "--multi", "--", "b=2"], {"multirun": True}),
        (["a=1", "b=2"], {}),
    ],
    ids=str,
)
def test_options_and_overrides_stand_in_any_order_for_hydra(words: list[str], options: dict[str, object]) -> None:
    read = vars(get_args_parser().parse_args(parse(["train", *words]).words))
    assert read["overrides"] == ["a=1", "b=2"]
    assert {key: value for key, value in read.items() if value and key != "overrides"} == options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hlep"], "there is no option --hlep (did you mean --help?)"),
        (["--verison"], "there is no option --verison (did you mean --version?)"),
        (["-x"], "there is no option -x; there are -h, --help, "),
        (["train", "--hlep"], "did you mean --help?"),
        (["verify", "x", "--verison"], "did you mean --version?"),
        (["train", "seed=1", "--", "--hlep=1"], "did you mean --help?"),
        (["train", "--help", "schedule=itrative"], "no choice 'itrative' (did you mean iterative?)"),
        (["train", "--cfg", "jobb"], "invalid choice: 'jobb' (choose from "),
        (["train", "--info", "zzz"], "invalid choice: 'zzz' (choose from "),
        (["train", "--info", "seed=1"], "invalid choice: 'seed=1' (choose from "),
        (["Train"], "did you mean train?"),
    ],
    ids=str,
)
def test_a_mistyped_option_or_choice_is_a_sentence(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(words)


def test_arguments_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-odd").mkdir()
    asked = parse(["verify", "-odd", "b", "--reference", "c", "--no-timing"]).values
    assert ([str(folder) for folder in asked.folder], str(asked.reference)) == (["-odd", "b"], "c")
    assert asked.no_timing
    (bos,) = (action for action in parser_of("generate").known if "--bos" in action.option_strings)
    assert bos.choices == BOS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("modle", r"no group or key 'modle' (did you mean model?)"),
        ("zzz", "there is no group or key 'zzz'; there are model, data, "),
        ("schedule.cout", "schedule has no key 'cout' (did you mean schedule.count?)"),
        ("data.max_documents", "(did you mean data.source.max_documents?)"),
        ("schedule.mixers_lr", "schedule.mixers_lr is a key of schedule=align alone"),
        ("run.zzz", "run has no key 'zzz'; it has checkpoint_every, "),
        ("model", "model takes a choice: one of gpt2, "),
        ("hydra.x", "no key of Hydra's"),
        ("Schedule.COUNT", "(did you mean schedule?)"),
        ("teacher", "teacher takes keys: teacher.cache, "),
        ("seed", "seed takes a value: seed=VALUE"),
    ],
)
def test_an_unknown_key_says_what_it_may_have_meant(name: str, said: str) -> None:
    assert said in unknown_key(name)


def test_errors_of_several_lines_are_one_sentence() -> None:
    assert one_sentence("a.\n  b\n\nc") == "a. b; c"
    assert in_own_words("In 'config': Could not find 'block/slimm'\n\nAvailable options...").startswith(
        "block has no choice 'slimm' (did you mean slim?); choose "
    )
    assert in_own_words("mismatched\nSee https://hydra.cc/docs/1.2/advanced/override_grammar/basic").startswith("that")
    assert "append" not in in_own_words("Could not add 'x'.\nTo append to your config use +x=1\n    full_key: x")


def test_a_plugin_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever conf/hydra starts from is Hydra's own or of an extra, and Hydra's own message says which."""
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    Plugins.instance()  # they bring their configs
    for file in sorted((CONF / "hydra").glob("*/*.yaml")):
        kind, (base, *_) = file.parent.name, yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]
        plugin = base.partition("@")[0]
        if plugin == "basic":
            continue
        extra = _PLUGINS[f"{kind}/{plugin}"]
        assert extra in extras
        with monkeypatch.context() as patch:
            patch.delitem(ConfigStore.instance().repo["hydra"][kind], f"{plugin}.yaml", raising=False)
            for chosen in (file.stem, plugin):
                with pytest.raises(ValueError, match=re.escape(f"pip install 'iskd[{extra}]'")):
                    compose_config([f"hydra/{kind}={chosen}"])


def test_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words_for("iskd tr") == ["train"]
    assert words_for("iskd train sch") == ["schedule="]
    assert words_for("iskd train -m schedule=it") == ["schedule=iterative"]
    assert words_for("iskd train seed=1 schedule.tar") == ["schedule.target_layers=", "schedule.target_params="]
    assert words_for("iskd verify x") == words_for("iskd train data.path=") == [], "files are the shell's business"
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setattr(sys, "argv", ["iskd", "completion", shell])
        main()
        assert f"iskd completion {shell} --complete" in capsys.readouterr().out
    script = 'eval "$(python -m iskd completion bash)"; complete -p iskd'
    bash = subprocess.run(
        ["bash", "-c", script.replace("python", sys.executable)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert bash.stdout.strip() == "complete -o default -F _iskd iskd", bash.stderr


def test_a_process_knows_its_command_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISKD_COMMAND", raising=False)
    assert command_line() is None
    monkeypatch.setenv("ISKD_COMMAND", "train")
    monkeypatch.setattr(sys, "argv", ["iskd", "data.path=a b", "seed=1"])
    assert command_line() == "iskd train 'data.path=a b' seed=1"
    said = commit()
    assert said is None or len(said.removesuffix("-dirty")) == 40

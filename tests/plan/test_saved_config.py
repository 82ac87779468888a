"""Laws of a run's config on disk: what is written comes back, and every value means itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from iskd.plan.saved_config import literal, read_config


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_what_a_run_saves_comes_back(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "lr": 1e-05,
        "big": 1e30,
        "none": None,
        "on": True,
        "text": "2024-01-01",
        "digits": "1e-3",
    }
    values |= {"name": "a: b # c ' \" \\ $ {x} $x é", "list": [1, [2.5, {"deep": ""}]], "empty": {}, "no": "no"}
    assert read_config(written(tmp_path, OmegaConf.to_yaml(OmegaConf.create(values)))) == values


@pytest.mark.parametrize(
    "text", ["1e-3", "1.0e5", "2E+4", "0.1", "1_0.5", ".5", "1.", "2024-01-01", "1e5x", "e5", "0x1f"]
)
def test_a_value_edited_by_hand_is_read_as_omegaconf_reads_it(text: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"value: {text}\n")
    assert read_config(file)["value"] == OmegaConf.load(file)["value"]  # type: ignore[index]


def test_parts_have_their_names_of_today(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, "model: {_target_: iskd.teachers.TeacherSpec}"))
    assert config["model"]["_target_"] == "iskd.teacher.load.TeacherSpec"


INTERPOLATIONS = {
    "a: ${b}": r"a holds '\$\{b\}'",
    "a: {b: [1, {c: 'x ${oc.env:HOME}'}]}": r"a\.b\[1\]\.c holds",
    "a: '\\${b}'": "no escaped one either",
    "a: '\\\\\\${b}'": "no escaped one either",
    "'${b}': 1": "holds no interpolation",
    "a: {'x${b}': 1}": "holds no interpolation",
    '"a": "\\u0024{b}"': "holds no interpolation",
    "a: |\n  ${b}\n": "holds no interpolation",
    "a: !!str ${b}": "holds no interpolation",
}


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_an_interpolation_is_refused_wherever_it_stands(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=INTERPOLATIONS[text]):
        read_config(written(tmp_path, text))


BROKEN = {
    "a: &x [1]\nb: *x": "alias",
    "a: &x {b: *x}": "alias",
    "a: 1\na: 2": "stands twice",
    "a: !!python/object/apply:os.system [x]": "could not determine a constructor",
    "a: !!binary aaaa": "is a bytes",
    "a: !!set {x}": "is a set",
    "a: !!timestamp 2024-01-01": "is a date",
    "- 1": "must hold keys and values, got list",
    "": "must hold keys and values, got NoneType",
    "loss: {kl: {_target_: [iskd.losses.kl.KL]}}": r"loss\.kl\._target_=\['iskd.* must be the dotted path",
    "edit: {_target_: {}}": r"edit\._target_=\{\} must be the dotted path",
    "edit: {_target_: null}": r"edit\._target_=None must be the dotted path of a class",
}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_what_no_run_writes_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=BROKEN[text]):
        read_config(written(tmp_path, text))


def test_only_a_plain_file_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("config.yaml", "endless", "."):
        with pytest.raises(ValueError, match=r"is not a plain file|is a link out of its folder"):
            read_config(tmp_path / name)


def test_a_config_in_memory_is_looked_at_alike() -> None:
    assert literal({"a": [1, "$ {"]}, "this run") == {"a": [1, "$ {"]}
    with pytest.raises(ValueError, match=r"this run: a\[0\] holds"):
        literal({"a": ["${x}"]}, "this run")

"""The Dockerfile: what it promises, read off its instructions; `tests.image` carries them out without a daemon."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.image import Image, context, filled, ignored, instructions

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STEPS = list(instructions(TEXT))


def image(**given: str) -> Image:
    found = Image()
    for word, rest in STEPS[[word for word, _ in STEPS].index("FROM") + 1 :]:
        found.take(word, rest, given)
    return found


def test_the_image_is_the_command_and_nobody_is_root() -> None:
    found = image()
    assert found.entrypoint == ["iskd"]
    assert found.command == ["--help"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", found.user), "by number, so that a cluster can see that it is not root"
    assert [word for word, _ in STEPS][-3:] == ["USER", "ENTRYPOINT", "CMD"], "whatever runs before is the build"


def test_what_is_written_lies_in_volumes() -> None:
    found = image()
    assert found.volumes == ["/iskd/runs", "/caches"]
    assert found.workdir == "/iskd"
    for name in ("HF_HOME", "ISKD_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert found.env[name].startswith("/caches/"), name
    made = next(rest for word, rest in STEPS if word == "RUN" and "useradd" in rest)
    assert "chmod 1777 runs /caches /home/user" in made


def test_torch_comes_from_where_the_builder_says() -> None:
    assert image().args["PIP_TORCH_FLAGS"] == ""
    assert image(TORCH_CPU_INDEX="URL").args["PIP_TORCH_FLAGS"] == "-i URL"
    assert image(TORCH_CPU_INDEX="URL", PIP_TORCH_FLAGS="--pre").args["PIP_TORCH_FLAGS"] == "--pre"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert image().args["TORCH"] == re.search(r"^TORCH \?= (\S+)$", makefile, re.MULTILINE)[1]  # type: ignore[index]


def test_compilers_and_kernels() -> None:
    runs = [rest for word, rest in STEPS if word == "RUN"]
    assert any("apt-get install" in rest and " g++ " in rest and "rm -rf /var/lib/apt/lists" in rest for rest in runs)
    [kernels] = [rest for rest in runs if "${KERNELS}" in rest]
    assert "torch.version.cuda is None" in kernels, "a CPU has no use for them"
    name, _, version = image().args["KERNELS"].partition("==")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = re.search(rf'^gpu = \["{name}>=([\d.]+)"\]$', project, re.MULTILINE)
    assert least is not None
    assert [int(part) for part in version.split(".")] >= [int(part) for part in least[1].split(".")]


def test_dependencies_come_before_code() -> None:
    copies = [rest for word, rest in STEPS if word == "COPY"]
    assert copies == ["requirements.lock ./", ". ."]


@pytest.mark.parametrize(
    ("path", "left_out"),
    [
        ("iskd/__main__.py", False),
        (".venv/bin/python", True),
        (".venv-docs/bin/mkdocs", True),
        ("iskd/models/__pycache__/x.pyc", True),
        ("runs/a/stages.json", True),
        ("iskd/runs.py", False),
        ("models/mine.safetensors", True),
        ("tests/files/0.1/finished/model/model.safetensors", False),
        ("docs/wandb/sweep.yaml", False),
        ("wandb/run/a", True),
    ],
)
def test_the_image_is_sent_the_project_and_no_runs(path: str, left_out: bool) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored(path, [line for line in lines if line and not line.startswith("#")]) == left_out


def test_the_context_holds_what_is_installed() -> None:
    sent = set(context()) if (ROOT / ".git").exists() else {"iskd/__init__.py"}
    assert "iskd/__init__.py" in sent
    assert not any(path.startswith((".git/", "runs/")) for path in sent)


def test_a_line_is_filled_as_docker_fills_it() -> None:
    values = {"A": "x", "EMPTY": ""}
    assert filled("${A} ${B} ${B:-y} ${A:+z} ${EMPTY:+z}", values) == "x  y z "
    assert filled("${A:+-i ${A}}", values) == "-i x"
    assert list(instructions("# no\nRUN a \\\n    && b\nUSER 1\n")) == [("RUN", "a && b"), ("USER", "1")]
    with pytest.raises(ValueError, match="HEALTHCHECK is no instruction"):
        list(instructions("HEALTHCHECK NONE"))


def test_the_linter_is_part_of_what_a_change_must_pass() -> None:
    assert "step make image-check" in Path(ROOT / ".ci" / "run").read_text(encoding="utf-8")

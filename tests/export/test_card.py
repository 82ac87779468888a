"""The model card says what the files of a run say, invents nothing, and publishes no folder of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from iskd.export.card import licence_of, write_card
from iskd.export.card_measured import refresh_card
from iskd.plan import Record, Remove, Replace, Spec, StageResult
from iskd.plan.edits import Merge
from iskd.plan.results import write_stages
from tests.run_folders import EFFICIENCY

SLIM = Spec("iskd.blocks.slim.Slim", {"ratio": 0.5})
HUB = {"name": "some/teacher", "kind": "hub", "sha256": "ab" * 32, "revision": "v2"}
RECORD = Record(8).extended(
    [Replace(1, SLIM), Remove(2), Remove(1), Remove(4), Merge(7), *(Replace(i, SLIM) for i in (5, 6))]
)


def card(folder: Path, **facts: Any) -> tuple[dict[str, Any], str]:
    """The header and the text of a card."""
    defaults: dict[str, Any] = {"native": False, "model_type": "llama", "parameters": 12_345, "versions": {"iskd": "1"}}
    folder.mkdir(exist_ok=True)
    text = write_card(folder, facts.pop("record", RECORD), **{**defaults, **facts}).read_text()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.parametrize(
    ("teacher", "source", "own", "said"),
    [
        (
            HUB,
            "HubDataset(name='Salesforce/wikitext', config='x')",
            "",
            ("some/teacher", ["Salesforce/wikitext"], ["en"]),
        ),
        (HUB, "HubDataset(name='a/b', config=None)", "", ("some/teacher", ["a/b"], None)),
        (HUB, "Docstrings(min_chars=80)", "", ("some/teacher", None, ["en"])),
        (
            HUB,
            "Mix(a=HubDataset(name='a/b', config=None), b-c=HubDataset(name='c/d', config='e'), f=TextFiles(path='g'))",
            "",
            ("some/teacher", ["a/b", "c/d"], None),
        ),
        (
            HUB,
            "Mix(a=HubDataset(name='Salesforce/wikitext', config='x'), b=Docstrings(min_chars=80))",
            "",
            ("some/teacher", ["Salesforce/wikitext"], ["en"]),
        ),
        (HUB, "TextFiles(path=\"HubDataset(name='a/b'\")", "", ("some/teacher", None, None)),
        ({"kind": "local", "path": "there"}, "TextFiles()", "language: [de, fr]", (None, None, ["de", "fr"])),
        ({"kind": "local", "path": "there"}, "TextFiles()", "base_model: a/origin", ("a/origin", None, None)),
        ({"kind": "local", "path": "there"}, "TextFiles()", "base_model: ../up\nlanguage: no good", (None, None, None)),
        ({"kind": "local", "path": "models--a--b-c/snapshots/12"}, "", "", ("a/b-c", None, None)),
        ({"kind": "memory"}, "", "", (None, None, None)),
    ],
)
def test_the_header_says_where_a_student_comes_from(
    teacher: dict[str, Any], source: str, own: str, said: tuple[Any, ...], tmp_path: Path
) -> None:
    if "path" in teacher:
        place = tmp_path / teacher["path"]
        place.mkdir(parents=True)
        (place / "README.md").write_text(f"---\n{own or 'tags: [x]'}\n---\n")
        teacher = {**teacher, "path": str(place)}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.json").write_text(json.dumps({"source": source}))
    header, _ = card(tmp_path / "card", teacher=teacher, run_dir=tmp_path / "run")
    assert tuple(header.get(key) for key in ("base_model", "datasets", "language")) == said
    assert header.get("base_model_relation") == ("finetune" if said[0] else None)


def run_files(folder: Path) -> Path:
    """A run's files, with folders of a machine in them."""
    folder.mkdir()
    common: dict[str, Any] = {"params": 1000, "block_params": 900, "kl": 0.5, "top1": 0.75, "seconds": 1.0}
    stages = [
        StageResult(index=0, name="teacher", ppl=10.0, retention=1.0, tokens=0, **common),
        StageResult(index=1, name="remove 2", ppl=12.5, retention=0.5, tokens=64, **common),
        StageResult(index=2, name="remove 3", ppl=99.0, retention=0.1, tokens=99, status="rolled_back", **common),
    ]
    write_stages(folder, stages)
    place = str(Path.home() / "texts" / "mine.txt")
    data = {"source": f"TextFiles(path={place!r})", "content": "c0ffee", "tokens": {"train": 5000}}
    data |= {"validation_sha256": "feed", "calibration_sha256": {"2048": "beef"}, "selection_sha256": {"piqa": ["a"]}}
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "environment.json").write_text(json.dumps({"teacher": {"name": place, "kind": "local", "path": place}}))
    config = {"seed": 7, "schedule": {"_target_": "iskd.schedules.iterative.Iterative", "tokens": 64, "path": place}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_card_says_what_the_files_say(tmp_path: Path) -> None:
    header, body = card(tmp_path / "card", teacher=HUB, run_dir=run_files(tmp_path / "run"))
    assert header["library_name"] == "transformers"
    assert header["base_model"] == "some/teacher"
    assert {"iskd", "custom_code"} <= set(header["tags"])
    assert "license" not in header
    assert "licence of the teacher: not known" in body
    for said in (
        HUB["sha256"],
        "v2",
        "12,345 parameters",
        "4 of 8 layers",
        "c0ffee",
        "feed",
        "beef",
        "items of piqa that layers were chosen by: 1",
    ):
        assert said in body
    assert "Removed 4 of 8 layers: 1, 2, 4, 7." in body
    assert "Merged into the block below where that was nearer to the teacher: 7." in body
    assert "Replaced the block of layers 5, 6 by `iskd.blocks.slim.Slim` (ratio=0.5)." in body
    assert "| perplexity | 10 | 12.5 |" in body, "the last stage that was kept"
    assert "| remove 3 | 99 | 99 | 0.1 | undone |" in body
    assert "schedule: Iterative (path=mine.txt, tokens=64)" in body
    assert "needs the package iskd: pip install " in body
    assert str(Path.home()) not in body


def test_card_without_a_run_invents_nothing(tmp_path: Path) -> None:
    header, body = card(tmp_path / "card", native=True, record=Record(4))
    assert {"base_model", "license"}.isdisjoint(header)
    assert "custom_code" not in header["tags"]
    for said in ("name: not known", "sha256 of its weights: not known", "licence of the teacher: not known"):
        assert said in body
    assert "No layer was edited" in body
    assert "Nothing was measured" in body
    assert "iskd is not needed" in body
    assert "trust_remote_code" not in body


def scores(value: float) -> dict[str, Any]:
    """An evaluation.json."""
    bounds = {"value": value, "low": value - 0.1, "high": value + 0.1}
    common = {"teacher": 0.5, "items": 100, "retention": bounds, "chance": 0.25}
    return {
        "tasks": [
            {"task": "arc_easy", "student": value / 2, "metric": "acc", **common},
            {"task": "copy", "student": value / 4, "metric": "led", **common},
        ],
        "retention": {"choice": bounds, "generation": bounds},
        "mean_retention": bounds,
        "text": {"perplexity": 12.25, "bits_per_byte": 1.5, "teacher_perplexity": 11.0, "teacher_bits_per_byte": 1.25},
        "settings": {"device": "cpu", "precision": "float32", "limit": None, "seed": 0, "versions": {"lm_eval": "1"}},
    }


def test_card_has_scores_and_efficiency_and_takes_new_ones_later(tmp_path: Path) -> None:
    run_dir = run_files(tmp_path / "run")
    header, before = card(tmp_path / "card", teacher=HUB, run_dir=run_dir)
    assert "model-index" not in header
    assert "## Scores" not in before
    file = tmp_path / "card" / "README.md"
    file.write_text(file.read_text() + "\nAn owner's own words.\n")
    for value in (0.8, 0.9):
        (run_dir / "evaluation.json").write_text(json.dumps(scores(value)))
        (run_dir / "efficiency.json").write_text(json.dumps(EFFICIENCY))
        assert refresh_card(tmp_path / "card", run_dir) == file
    _, front, body = file.read_text().split("---\n", 2)
    renewed = yaml.safe_load(front)
    (index,) = renewed["model-index"]
    name, results = model_index_to_eval_results([index])
    assert name == "teacher, compressed by iskd"
    found = {result.dataset_name: (result.dataset_type, result.metric_type, result.metric_value) for result in results}
    assert found == {"arc_easy": ("allenai/ai2_arc", "acc", 0.45), "copy": ("copy", "led", 0.225)}
    assert {key: value for key, value in renewed.items() if key != "model-index"} == header
    assert body.count("## Scores") == body.count("## Efficiency") == 1
    for said in (
        "| arc_easy | acc | 25.0 | 50.0 | 45.0 | 90.0 (80.0 to 100.0) | 100 |",
        "| mean, choice |",
        "| mean |",
        "| perplexity | 11.00 | 12.25 |",
        "Measured with device cpu, precision float32, limit none, seed 0, lm_eval 1.",
        "| prefill of 128 tokens (ms) | 25.6 | 20.5 | 0.80 |",
        "Measured on: name cpu of a test",
        "An owner's own words.",
        "## Data",
    ):
        assert said in body
    again = card(tmp_path / "again", teacher=HUB, run_dir=run_dir)
    assert (again[0], again[1].strip()) == (renewed, body.replace("\nAn owner's own words.\n", "").strip())
    assert refresh_card(tmp_path, run_dir) is None


def test_a_card_without_marks_gets_them_at_its_end_and_a_broken_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("[]")
    (tmp_path / "README.md").write_text("# Mine\n")
    refresh_card(tmp_path, tmp_path)
    assert "## Scores" not in (tmp_path / "README.md").read_text(), "what cannot be read is no score"
    (tmp_path / "evaluation.json").write_text(json.dumps(scores(0.5)))
    refresh_card(tmp_path, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.index("# Mine") < text.index("## Scores")
    (tmp_path / "README.md").write_text("---\na: [\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"the header of .*README\.md cannot be read"):
        refresh_card(tmp_path, tmp_path)


def test_what_an_owner_wrote_is_kept(tmp_path: Path) -> None:
    header = "license: mit\nmodel_name: Mine\ntags:\n- a\n- a\nx_own:\n  deep: caf\u00e9"
    body = "\n# Mine\n\nWords -- caf\u00e9.\n"
    broken = "\nmodel-index: of the owner"
    (tmp_path / "README.md").write_text(f"---\n{header}{broken}\n---\n{body}", encoding="utf-8")
    refresh_card(tmp_path, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"---\n{header}\n---\n{body.rstrip()}")
    (tmp_path / "evaluation.json").write_text(json.dumps(scores(0.5)))
    refresh_card(tmp_path, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"---\n{header}\nmodel-index:")
    assert f"---\n{body.rstrip()}" in text
    assert yaml.safe_load(text.split("---")[1])["model-index"][0]["name"] == "Mine"


@pytest.mark.parametrize("front", ["- a list", "just words", "# nothing but a comment", "1: 2", "a: \xff"])
def test_a_header_that_holds_no_keys_is_named_and_left(front: str, tmp_path: Path) -> None:
    before = f"---\n{front}\n---\n# Mine\n".encode("latin-1")
    (tmp_path / "README.md").write_bytes(before)
    with pytest.raises(ValueError, match=r"the header of .*README\.md (cannot be read|must hold keys and values)"):
        refresh_card(tmp_path, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", "mit"),
        ("license: other\nlicense_name: their-own", "their-own"),
        ("license: [mit]", "mit"),
        ("license: [mit, apache-2.0]", "mit or apache-2.0"),
        ("license: [1, mit]", None),
        ("language: en", None),
        ("license: [", None),
    ],
)
def test_licence_is_that_of_the_card_beside_the_weights(front: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A teacher\nlicense: wrong\n")
    teacher = {"name": "mine", "kind": "local", "path": str(tmp_path)}
    assert licence_of(teacher) == licence
    header, body = card(tmp_path / "card", teacher=teacher)
    named = licence.replace(" ", "-") if licence else None
    assert header.get("license_name", header.get("license")) == named, "hubs take no name but their own"
    assert f"licence of the teacher: {licence or 'not known'}" in body
    assert licence_of({"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "kind": "bundled"}) == "apache-2.0"
    assert licence_of({"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "kind": "random"}) is None

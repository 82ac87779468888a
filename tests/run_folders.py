"""Folders as runs leave them, and a parser for pages: what the tests of the reports share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from iskd.plan import StageResult
from iskd.plan.results import write_stages

LAYERS = 6
VOID = {"meta", "br", "hr", "img", "link", "input"}


def stage(index: int, **changes: object) -> StageResult:
    """A plausible stage; `changes` override its fields."""
    values: dict[str, object] = {
        "index": index,
        "name": "teacher" if index == 0 else f"replace {index}",
        "edits": [{"op": "replace", "layer": index, "block": "iskd.blocks.slim.Slim"}] if index else [],
        "params": 4_000_000 - 30_000 * index,
        "block_params": 3_000_000 - 30_000 * index,
        "ppl": 20.0 + index,
        "kl": 0.05 * index,
        "top1": 1.0 - 0.02 * index,
        "retention": 1.0 - 0.03 * index,
        "before": {"ppl": 90.0 * index**3, "kl": 0.5, "top1": 0.4, "retention": 0.7} if index else None,
        "tokens": 100_000 * index,
        "seconds": 12.5,
        "tokens_per_s": 5000.0,
        "scores": {str(i): 0.01 * 4.0**i for i in range(LAYERS)} if index < 2 else None,
    }
    return StageResult(**(values | changes))  # type: ignore[arg-type]


STAGES = [
    stage(0),
    stage(1),
    stage(2, status="rolled_back", events=["retention is under the floor"]),
    stage(3, name="remove 3", edits=[{"op": "remove", "layer": 3}]),
    stage(4, name="convert 4", edits=[{"op": "convert", "layer": 4, "mixer": {"target": "iskd.mixers.gla.GLA"}}]),
    stage(5, name="finetune", edits=[], before=None),
]


def measured(size: float, contexts: Sequence[int], cache: float, growing: bool) -> dict[str, Any]:
    """One model of an efficiency.json: sizes scale with `size`, the cache grows with the context or does not."""
    return {
        "params": int(4e6 * size),
        "bytes": int(16e6 * size),
        "peak_memory_bytes": int(90e6 * size),
        "contexts": [
            {
                "context": context,
                "prefill_seconds": 2e-4 * context * size,
                "decode_seconds_per_token": 0.004 * size,
                "cache_bytes": int(cache * (context if growing else 256)),
            }
            for context in contexts
        ],
    }


EFFICIENCY = {
    "machine": {"name": "cpu of a test", "threads": 1},
    "teacher": measured(1.0, (128, 512, 2048), 1536.0, growing=True),
    "student": measured(0.8, (128, 512, 2048), 1024.0, growing=False),
}
EVALUATION = {
    "tasks": {
        "piqa": {"student": 0.61, "teacher": 0.68, "retention": 0.897, "low": 0.84, "high": 0.95, "items": 200},
        "lambada_with_a_long_name_of_its_own": {"student": 0.2, "teacher": 0.4, "retention": 0.5},
    },
    "mean_retention": 0.6985,
    "seed": 7,
    "sizes": {"piqa": 200},
}


LENGTHS = {
    "tasks": [
        {"task": f"recall_{length}", "student": student, "student_error": 0.05, "teacher": 0.9, "teacher_error": 0.02}
        for length, student in ((64, 0.8), (256, 0.5), (1024, 0.1))
    ],
    "positions": [
        {"first": 1, "last": 16, "tokens": 160, "student": 3.5, "teacher": 3.25},
        {"first": 17, "last": 32, "tokens": 160, "student": 3.25, "teacher": 3.0},
        {"first": 33, "last": 64, "tokens": 320, "student": 3.0, "teacher": None},
    ],
    "models": {"teacher": {"limit": 256}, "student": {"limit": None}},
}


def write_run(
    folder: Path,
    stages: Sequence[StageResult] = STAGES,
    *,
    config: str = "seed: 7\n",
    finished: bool = True,
    files: Mapping[str, Any] | None = None,
    layers: int = LAYERS,
) -> Path:
    """A run as it leaves its folder.

    Args:
        folder: Made here.
        stages: What stages.json holds.
        config: Text of config.yaml.
        finished: Whether the run came to its record and its exported model.
        files: More JSON files by name, without ".json".
        layers: Layers of the teacher.
    """
    folder.mkdir(parents=True)
    write_stages(folder, stages)
    rows = [f"{1000 * i},{i},1,{3 + 1 / (i + 1)},{1 / (i + 1)},0.5,\n" for i in range(500)]
    header = "tokens,step,stage,train/loss,train/kl,train/grad_norm,val/ppl\n"
    (folder / "metrics.csv").write_text(header + "".join(rows) + ",,,,,,21.5\n", encoding="utf-8")
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    facts: dict[str, Any] = {
        "data": {"train": {"sha256": "ab" * 32, "tokens": 2_391_884}, "windows": [str(i) for i in range(99)]},
        "environment": {"torch": "2.13.0", "device": "cpu", "cores": 2},
    }
    if finished:
        edits = [edit for stage in stages for edit in stage.edits if stage.status == "kept"]
        facts["record"] = {"num_layers": layers, "edits": edits}
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(bytes(1000))
    for name, value in {**facts, **(files or {})}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


class Balanced(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.targets += [value or "" for name, value in attrs if name in ("href", "xlink:href", "src")]

"""Makes the files beside it with iskd 0.1 (commit 540ec33): see README.md. Every path in them is relative to here."""
# ruff: noqa: I001 - the names are those of 0.1

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from iskd import surgery
from iskd.export import export
from iskd.plan import Convert, Record, Remove, Replace, Spec, to_json
from iskd.teachers import TeacherSpec, load_teacher

HERE = Path(__file__).resolve().parent
OLD = Path(surgery.__file__).resolve().parents[1]
CONFIG = {
    **{"model_type": "llama", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512},
    **{"initializer_range": 0.3, "tie_word_embeddings": True},
}
# As typed: what tests/project/test_made_before.py types again.
SETTINGS = [
    *("debug=smoke", "model=local", "model.path=teacher", "data=text", "data.path=text.txt", "data.val_tokens=1024"),
    *("trainer=cpu", "trainer.precision=32-true", "run.checkpoint_every=2"),
    *("block.ratio=0.5", "schedule.lr=3e-3", "schedule.lr_new=3e-3", "loss=[kl,hidden]", "schedule.rescore=true"),
    *("eval=quick", "eval.tasks=[copy,piqa]", "eval.limit=10", "eval.data_dir=items"),
    *("eval.text=other.txt", "eval.tokens=512", "eval.window=64"),
    *("run.efficiency_seconds=1", "trainer.progress=false", "cache_dir=cache"),
]
GROUPS = ("model", "data", "edit", "block", "mixer", "importance", "schedule", "loss", "optim", "eval", "logger")


def write_texts() -> None:
    lines = (f"Sentence number {n} says that {n} plus {n % 7} is {n + n % 7}. " * 6 for n in range(120))
    (HERE / "text.txt").write_text("\n\n".join(lines))
    (HERE / "other.txt").write_text(" ".join(f"Ten times {n} is {10 * n}, which is even." for n in range(60)))
    items = (
        {"goal": f"Add {n} and one.", "sol1": f"It is {n + 1}.", "sol2": f"It is {n}.", "label": 0} for n in range(10)
    )
    (HERE / "items" / "piqa").mkdir(parents=True, exist_ok=True)
    (HERE / "items" / "piqa" / "eval.jsonl").write_text(
        "".join(json.dumps({"id": str(n), **item}) + "\n" for n, item in enumerate(items))
    )


def train(name: str) -> list[str]:
    shutil.rmtree(HERE / name, ignore_errors=True)
    return [sys.executable, str(OLD / "train.py"), *SETTINGS, f"hydra.run.dir={name}"]


def clean(name: str) -> None:
    """Drop what Hydra writes: folders of this machine stand in it, and no command reads it."""
    shutil.rmtree(HERE / name / ".hydra")
    (HERE / name / "cli.log").unlink()


def finished() -> None:
    subprocess.run(train("finished"), cwd=HERE, check=True)
    clean("finished")
    shutil.rmtree(HERE / "finished" / "checkpoints")
    (HERE / "finished" / "report.html").unlink()


def interrupted() -> None:
    """Kill a run in its second stage, so that its checkpoint lies inside a stage, with an edit before it."""
    folder, newest = HERE / "interrupted", HERE
    while not newest.name.endswith("-stage"):  # else it was at an edit, or over, when it was killed
        run = subprocess.Popen(train("interrupted"), cwd=HERE)
        while run.poll() is None and not list((folder / "checkpoints").glob("00000[6-8]-stage")):
            time.sleep(0.002)
        run.kill()
        run.wait()
        newest = max((folder / "checkpoints").glob("0*"))
    clean("interrupted")
    for place in (folder / "checkpoints").iterdir():
        if place != newest:
            shutil.rmtree(place)


def made_teacher() -> None:
    """A random model in a folder: what its weights are must not depend on anybody's initialisation."""
    made = load_teacher(TeacherSpec("tiny", pretrained=False, config=CONFIG))
    made.model.save_pretrained(HERE / "teacher")
    made.tokenizer.save_pretrained(HERE / "teacher")


@torch.no_grad()
def exported() -> None:
    """A student that needs iskd: a slim block, a mixer, a layer that is gone."""
    teacher = load_teacher(TeacherSpec("teacher", path=str(HERE / "teacher")))
    edits = (
        Replace(0, Spec("iskd.blocks.slim.Slim", {"ratio": 0.5}), seed=1),
        Convert(1, Spec("iskd.mixers.gated_deltanet.GatedDeltaNet", {"chunk": 8}), seed=2),
        Remove(2),
    )
    before, student = copy.deepcopy(teacher.model.config), teacher.model
    record = surgery.apply(student, Record(4), edits)
    shutil.rmtree(HERE / "export", ignore_errors=True)
    export(HERE / "export", student, record, before, teacher.tokenizer, teacher=teacher.source)
    ids = torch.tensor([list(b"Ten and one.")])
    logits = student.eval()(ids).logits
    save_file({"ids": ids, "logits": logits.contiguous()}, HERE / "logits.safetensors")


def parts() -> None:
    """Every part that conf/ names, as a run saves it: each key at its value."""
    found = {}
    with initialize_config_dir(str(OLD / "conf"), version_base="1.3"):
        for group in GROUPS:
            for file in sorted((OLD / "conf" / group).glob("*.yaml")):
                asked = f"{group}=[{file.stem}]" if group == "loss" else f"{group}={file.stem}"
                node = OmegaConf.to_container(compose("config", overrides=[asked])[group])
                found[f"{group}/{file.stem}"] = node
    (HERE / "parts.json").write_text(json.dumps(found, indent=1) + "\n")


def records() -> None:
    """A record for each block and each mixer."""
    found = {}
    for name, values in json.loads((HERE / "parts.json").read_text()).items():
        group, _, option = name.partition("/")
        if group in ("block", "mixer"):
            spec = Spec(values.pop("_target_"), values)
            edit = Replace(1, spec, seed=3) if group == "block" else Convert(1, spec, seed=3)
            found[option] = to_json(Record(4, (edit,)))
    (HERE / "records.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    write_texts()
    parts()
    records()
    made_teacher()
    exported()
    finished()
    interrupted()
    shutil.rmtree(HERE / "cache")

"""What people do with a student, as docs/after.md says it: every cell of its table is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TextIteratorStreamer, pipeline

import iskd
from iskd.evaluation import EvalSpec, evaluate
from iskd.export.student import write
from iskd.models import surgery
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Convert, Edit, Record, Remove, Replace
from tests.documents import ROOT
from tests.factories import block_specs, louder, mixer_specs, tiny, windows

BLOCKS, MIXERS = block_specs(), mixer_specs()
KINDS: dict[str, list[Edit]] = {
    "native": [Remove(1)],
    "compact": [Replace(1, BLOCKS["linear"]), Replace(2, BLOCKS["bottleneck"])],
    "converted": [Convert(1, MIXERS["gla"]), Convert(2, MIXERS["sliding"])],
}
VOCAB = 257
SOLVING = {name for name in MIXERS if "delta" in name or name == "kda"}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries on each other


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("after")
    for kind, edits in KINDS.items():
        model, teacher = tiny("llama", vocab=VOCAB), tiny("llama", vocab=VOCAB)
        record = surgery.apply(model, Record(4), edits)
        if kind == "converted":
            louder(model)  # or it would say what its teacher says
        write(root / kind, model, record, teacher.config, byte_tokenizer(), code="bundle")
    teacher.save_pretrained(root / "teacher")
    return root


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model: Any, seed: int = 0) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=windows(vocab=VOCAB, seed=seed), use_cache=False).logits
    return found


def same_text(model: Any, **options: Any) -> None:
    """With the options as without."""
    asked = byte_tokenizer()("Once upon", return_tensors="pt")
    assert torch.equal(model.generate(**asked, **GREEDY, **options), model.generate(**asked, **GREEDY))


def piped(folder: Path) -> None:
    said = pipeline("text-generation", model=str(folder), device="cpu")("Once upon", **GREEDY)[0]["generated_text"]
    model, tokenizer = load(folder), byte_tokenizer()
    assert said == tokenizer.decode(model.generate(**tokenizer("Once upon", return_tensors="pt"), **GREEDY)[0])


def streamed(folder: Path) -> None:
    model, tokenizer = load(folder), byte_tokenizer()
    asked, streamer = tokenizer("Once upon", return_tensors="pt"), TextIteratorStreamer(tokenizer)
    thread = Thread(target=lambda: model.generate(**asked, **GREEDY, streamer=streamer))
    thread.start()
    said = "".join(streamer)
    thread.join()
    assert said == tokenizer.decode(model.generate(**asked, **GREEDY)[0])


def beams(folder: Path) -> None:
    asked = byte_tokenizer()("Once upon", return_tensors="pt")
    model, options = load(folder), {"num_beams": 3, **GREEDY}
    assert torch.equal(model.generate(**asked, **options), model.generate(**asked, **options, use_cache=False))


def harness(folder: Path) -> None:
    """Its own process and command line; iskd is in no import of it."""
    place = folder.parent / f"{folder.name}-harness"
    place.mkdir()
    rows = [{"query": f"Once upon a {word}", "choices": ["time", "stone"], "gold": 0} for word in ("a", "b", "c")]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {place}/rows.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n"
    )
    trust = "" if folder.name == "native" else ",trust_remote_code=True"
    run = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--device",
        "cpu",
        "--tasks",
        "mine",
        "--batch_size",
        "1",
    ]
    run += ["--model_args", f"pretrained={folder}{trust}", "--include_path", str(place), "--output_path", str(place)]
    places = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(place),
        "HF_MODULES_CACHE": str(place / "modules"),
        "PYTHONPATH": "",
    }
    subprocess.run(run, check=True, cwd=place, env={**os.environ, **places}, timeout=400)
    (found,) = place.rglob("results_*.json")
    assert "acc,none" in json.loads(found.read_text())["results"]["mine"]


def adapted(folder: Path) -> None:
    import peft

    model = peft.get_peft_model(load(folder), peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    ids = windows(vocab=VOCAB)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    model.save_pretrained(folder.parent / f"{folder.name}-lora")
    merged = peft.PeftModel.from_pretrained(load(folder), folder.parent / f"{folder.name}-lora").merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    merged.save_pretrained(folder.parent / f"{folder.name}-merged")
    assert torch.equal(logits(iskd.load(folder.parent / f"{folder.name}-merged")), logits(merged))


def tuned(folder: Path) -> None:
    import trl
    from datasets import Dataset

    place, text = folder.parent / f"{folder.name}-sft", Dataset.from_dict({"text": ["Once upon a time there was"] * 8})
    quiet: dict[str, Any] = {
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    asked = trl.SFTConfig(output_dir=str(place), max_steps=2, per_device_train_batch_size=2, max_length=32, **quiet)
    trainer = trl.SFTTrainer(model=load(folder), args=asked, train_dataset=text, processing_class=byte_tokenizer())
    trainer.train()
    trainer.save_model(str(place))
    assert torch.equal(logits(iskd.load(place)), logits(trainer.model))
    assert not torch.equal(logits(trainer.model), logits(load(folder)))


def compiled(folder: Path) -> None:
    model = load(folder)
    found = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(found), logits(model))


def graph(folder: Path) -> None:
    """Drawn on some tokens, asked with others."""
    model = load(folder)
    options = {"input_ids": windows(vocab=VOCAB), "use_cache": False}
    program = torch.export.export(model, (), options, strict=False)
    torch.testing.assert_close(logits(program.module(), seed=3), logits(model, seed=3))


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return found


def onnx(folder: Path) -> None:
    import onnxruntime

    model, file = load(folder), str(folder.parent / f"{folder.name}.onnx")
    torch.onnx.export(_Logits(model), (windows(vocab=VOCAB),), file, dynamo=True, verbose=False)
    found = onnxruntime.InferenceSession(file).run(None, {"input_ids": windows(vocab=VOCAB, seed=3).numpy()})[0]
    torch.testing.assert_close(torch.tensor(found), logits(model, seed=3), atol=1e-5, rtol=1e-4)


def quantised(folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, before = load(folder), logits(load(folder))
    quantize_(model, Int8WeightOnlyConfig())
    difference = (logits(model) - before).abs().max()
    assert 0 < difference < 0.1 * before.abs().max()


def reported(folder: Path, kind: str = "int8") -> None:
    spec = EvalSpec(quantize=[kind], tokens=128, window=64)
    as_it_is, row = evaluate(load(folder), byte_tokenizer(), spec, text="Once upon a time there was " * 20).quantized
    assert not row.why
    assert row.bytes < as_it_is.bytes
    assert row.perplexity == pytest.approx(as_it_is.perplexity, rel=0.1)


STEPS: dict[str, Callable[[Path], None]] = {
    "text by `pipeline`": piped,
    "text while it is made (`TextIteratorStreamer`)": streamed,
    "beam search": beams,
    "generation with an assistant": lambda folder: same_text(
        load(folder), assistant_model=load(folder.parent / "teacher")
    ),
    "as the assistant of its teacher": lambda folder: same_text(
        load(folder.parent / "teacher"), assistant_model=load(folder)
    ),
    'a static cache (`cache_implementation="static"`)': lambda folder: same_text(
        load(folder), cache_implementation="static"
    ),
    "the harness's own command line": harness,
    "LoRA: train, save, load, merge, save as a student": adapted,
    "fine-tuning (`SFTTrainer`), saved as a student": tuned,
    "`torch.compile(fullgraph=True)`": compiled,
    "`torch.export`": graph,
    "ONNX (`torch.onnx.export(dynamo=True)`), run by onnxruntime": onnx,
    "weights of 8 bits (`quantize_`, `Int8WeightOnlyConfig`)": quantised,
    "what 8 bits change, in the report (`eval.quantize=[int8]`)": reported,
    "what 4 bits change, in the report (`eval.quantize=[int4]`)": lambda folder: reported(folder, "int4"),
}


def table() -> dict[str, dict[str, str]]:
    """The page's cells, by row and kind."""
    lines = (ROOT / "docs" / "after.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines if line.startswith("|")]
    return {row[0]: dict(zip(rows[0][2:], row[2:], strict=True)) for row in rows[2:]}


def test_the_page_says_what_is_run() -> None:
    said = table()
    assert said.keys() == STEPS.keys()
    assert all(cells.keys() == KINDS.keys() and set(cells.values()) <= {"yes", "no"} for cells in said.values())


def test_a_converted_student_is_drawn_as_a_graph(folders: Path) -> None:
    graph(folders / "converted")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "compact"])
def test_graphs_of_any_length(kind: str, folders: Path) -> None:
    """Drawn at one length and asked at another."""
    model, length = load(folders / kind), torch.export.Dim("length", min=2, max=32)
    options = {"input_ids": windows(t=12, vocab=VOCAB), "use_cache": False}
    shapes = {"input_ids": {1: length}, "use_cache": None}
    program = torch.export.export(model, (), options, dynamic_shapes=shapes, strict=False)
    asked = {"input_ids": windows(t=20, vocab=VOCAB), "use_cache": False}
    torch.testing.assert_close(program.module()(**asked).logits, model(**asked).logits)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_onnx_takes_all_mixers_but_those_that_solve(mixer: str, folders: Path) -> None:
    """As the page says: no triangular solve there."""
    model, teacher = tiny("llama", vocab=VOCAB), tiny("llama", vocab=VOCAB)
    record = surgery.apply(model, Record(4), [Convert(1, MIXERS[mixer])])
    write(folders / f"onnx-{mixer}", louder(model), record, teacher.config)
    if mixer in SOLVING:
        with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"triangular"):
            onnx(folders / f"onnx-{mixer}")
    else:
        onnx(folders / f"onnx-{mixer}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_every_cell_of_the_page(step: str, kind: str, folders: Path) -> None:
    if table()[step][kind] == "yes":
        STEPS[step](folders / kind)
        return
    with pytest.raises(ValueError, match=r"generate without an assistant|cache_implementation='dynamic'"):
        STEPS[step](folders / kind)

"""A native student through llama.cpp's own converter, and the file read again.

    LLAMA_CPP=FOLDER python -m pytest -m slow tests/export/test_gguf.py

FOLDER holds llama.cpp's `convert_hf_to_gguf.py` (a checkout, or what the source of llama-cpp-python carries as
vendor/llama.cpp); the converter needs sentencepiece. The teacher is the bundled one (`make teacher`), since the
converter knows tokenizers by their hash. transformers reads the file; where llama_cpp can be imported, it speaks too.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from iskd.export.student import write
from iskd.models import surgery
from iskd.plan import Edit, Record, Remove, Replace, Spec
from iskd.teacher.bundled import bundle, prepare

CONVERTER = Path(os.environ.get("LLAMA_CPP", ""), "convert_hf_to_gguf.py")
LAYERS, MLP = 30, 1536
KINDS: dict[str, list[Edit]] = {
    "layers removed": [Remove(layer) for layer in range(12, 16)],
    "fewer heads": [
        Replace(n, Spec("iskd.blocks.slim.Slim", {"kv_groups": 2, "channels": MLP})) for n in range(LAYERS)
    ],
    "fewer channels": [
        Replace(n, Spec("iskd.blocks.slim.Slim", {"kv_groups": 3, "channels": 512})) for n in range(LAYERS)
    ],
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CONVERTER.is_file(), reason="LLAMA_CPP names no folder with convert_hf_to_gguf.py"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def teacher() -> tuple[Any, Any]:
    folder = prepare(bundle("smollm2"))
    if folder is None:
        pytest.skip("no bundled teacher: make teacher")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_converts_and_says_the_same(kind: str, teacher: tuple[Any, Any], tmp_path: Path) -> None:
    whole, tokenizer = teacher
    student = copy.deepcopy(whole)
    record = surgery.apply(student, Record(LAYERS), KINDS[kind])
    assert write(tmp_path / "student", student, record, whole.config, tokenizer), "native"
    file = tmp_path / "student.gguf"
    command = [sys.executable, str(CONVERTER), str(tmp_path / "student"), "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    asked = tokenizer("The capital of France is", return_tensors="pt")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = (model(**asked).logits for model in (student.eval(), again))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    try:
        from llama_cpp import Llama
    except ImportError:
        return
    spoken = Llama(str(file), n_ctx=64, verbose=False, logits_all=True)
    spoken.eval(asked["input_ids"][0].tolist())
    logits = torch.tensor(spoken.scores[: asked["input_ids"].shape[1]])
    assert torch.equal(logits.argmax(-1), ours[0].argmax(-1))

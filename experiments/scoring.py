"""What comparisons on SmolLM2-135M share: texts and items that nothing was fitted to, and students' scores on them.

Perplexity and KL on WikiText-2 test (in domain), perplexity on the standard library's docstrings (out of domain),
LAMBADA and repeating lists of words (greedy decoding), HellaSwag, PIQA and ARC-easy (log-likelihoods). The script of an
experiment puts this folder on its path and imports this file.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from iskd.system.allocator import tune

tune()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from iskd.data.files.readers import detokenize_wikitext  # noqa: E402
from iskd.data.sources import Docstrings  # noqa: E402
from iskd.evaluation.judging import evaluate  # noqa: E402
from iskd.evaluation.metrics import QualityMetrics  # noqa: E402
from iskd.evaluation.tasks import Item  # noqa: E402
from iskd.evaluation.tasks.task_items import CBT_SENTENCE, COPY, copy_items, read_sentences, read_task  # noqa: E402
from iskd.models import (  # noqa: E402
    Stack,
    surgery,
    weights,
)
from iskd.plan import Record  # noqa: E402
from iskd.system.precision import fast_bf16  # noqa: E402
from iskd.teacher import TeacherSpec, load_teacher  # noqa: E402
from iskd.training.state import checkpoint  # noqa: E402

METRICS = {"lambada": "acc", "hellaswag": "acc_norm", "piqa": "acc", "arc_easy": "acc", "copy": "led"}
GAPS = {CBT_SENTENCE: "acc_token"}
"""Asked where the data have it: gaps in sentences, filled by the least mean loss, with nothing before them."""
SMOLLM2 = TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2")
AVERAGED = ("lambada", "hellaswag", "piqa", "arc_easy")
TEXTS = ("kl", "ppl_wikitext", "ppl_docstrings", "lambada_nll")
NAMES = dict(
    zip(
        (*TEXTS, *METRICS, *GAPS),
        ("KL", "ppl WikiText-2", "ppl docs", "LAMBADA nll", "LAMBADA", "HellaSwag", "PIQA", "ARC-e", "copy", "gaps"),
        strict=True,
    )
)
"""In the heads of tables."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def windows(tokenizer: Any, text: str, tokens: int, length: int = 512) -> Tensor:
    """Evenly spaced windows [n, length] of a text."""
    ids = torch.tensor(tokenizer(text).input_ids)
    starts = torch.linspace(0, len(ids) - length - 1, tokens // length).long()
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def last_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The head's input [1, T, D] for one window [T]."""
    return model.base_model(ids[None].to(DEVICE)).last_hidden_state


def autocast() -> torch.autocast:
    """bf16 where the machine is fast at it, as in training."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda" or fast_bf16())


class Scorer:
    """Texts and items, and the teacher's distribution on the former."""

    def __init__(
        self,
        data: Path,
        items: int,
        tokens: int,
        spec: TeacherSpec = SMOLLM2,
        metrics: Mapping[str, str] = METRICS,
    ) -> None:
        self.teacher, self.metrics = load_teacher(spec), metrics
        with gzip.open(data / "wikitext2" / "test.txt.gz", "rt", encoding="utf-8") as file:
            wikitext = detokenize_wikitext(file.read())
        docstrings = "\n\n".join(text for text, _ in Docstrings().documents())
        self.texts = {
            name: windows(self.teacher.tokenizer, text, tokens)
            for name, text in (("wikitext", wikitext), ("docstrings", docstrings))
        }
        self.tasks = {name: _items(name, data, items) for name in metrics}
        torch.nn.Module.to(self.teacher.model, DEVICE)
        with autocast():
            self.goals = {
                name: [last_hidden(self.teacher.model, ids) for ids in text] for name, text in self.texts.items()
            }

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """All scores of one model; tasks as one number per item."""
        return self.on_texts(model) | self.on_tasks(model, list(self.tasks))

    def on_texts(self, model: PreTrainedModel) -> dict[str, float]:
        """KL, retention and perplexity."""
        model.eval().to(DEVICE)
        with autocast():
            wikitext, docstrings = (self._on_text(model, name) for name in self.texts)
        found = {"kl": wikitext["kl"], "ppl_wikitext": wikitext["ppl"]}
        return {**found, "ppl_docstrings": docstrings["ppl"], "retention": wikitext["retention"]}

    def on_tasks(self, model: PreTrainedModel, names: Sequence[str], every: int = 1) -> dict[str, Any]:
        """A number for each n-th item of some of the tasks, and LAMBADA's nll."""
        model.eval().to(DEVICE)
        found: dict[str, Any] = {}
        with autocast():
            for name in names:
                result = evaluate(model, self.teacher.tokenizer, self.tasks[name][::every], first_given=name in GAPS)
                found[name] = [round(value, 3) for value in result.of(self.metrics[name]).tolist()]
                if name == "lambada":
                    found["lambada_nll"] = -result.mean("log_p")
        return found

    def _on_text(self, model: PreTrainedModel, name: str) -> dict[str, float]:
        """Perplexity, KL to the teacher and the rest on one text, every next token once."""
        metrics = QualityMetrics().to(DEVICE)
        heads = Stack(model).head, Stack(self.teacher.model).head
        for ids, goal in zip(self.texts[name], self.goals[name], strict=True):
            hidden, labels = last_hidden(model, ids), ids[None, 1:].to(DEVICE)
            metrics.update_from_hidden(hidden[:, :-1], heads[0], goal[:, :-1], heads[1], labels)
        return metrics.compute()


def _items(name: str, data: Path, limit: int) -> list[Item]:
    """At most so many items of a task; of lists to copy, which are long, at most 50."""
    if name == COPY:
        return copy_items(min(limit, 50))
    return read_sentences(data)[:limit] if name in GAPS else read_task(name, data, limit)


def boundaries(run: Path) -> list[Path]:
    """The checkpoints at the ends of a run's stages, the oldest first."""
    return sorted((run / "checkpoints").glob("*-boundary"), key=lambda path: int(path.name.partition("-")[0]))


def student_at(path: Path, teacher: PreTrainedModel) -> PreTrainedModel:
    """The student of a checkpoint."""
    state, model = checkpoint.read_state(path), copy.deepcopy(teacher)
    surgery.apply(model, Record(state.record.num_layers), state.record.edits)
    weights.load_model_tensors(model, checkpoint.Stored(path, "student"))
    return model


def score(run: Path, depths: list[int] | None, scorer: Scorer, kept: Path) -> list[dict[str, Any]]:
    """Score a run's students of the wanted depths, write NAME.json into the folder `kept`, and what the teacher lacks.

    Of several students of a depth it is the first; without depths the last student of all.
    """
    kept.mkdir(exist_ok=True)
    rows = json.loads((run / "stages.json").read_text())
    found: list[dict[str, Any]] = []
    file, model = kept / "teacher.json", scorer.teacher.model
    if not file.exists():
        size = {"layers": len(Stack(model).layers), "params": surgery.parameters(model)}
        file.write_text(json.dumps({**size, "tokens": 0, "seconds": 0, **scorer.score(model)}))
    teacher = json.loads(file.read_text())
    if lacking := [name for name in scorer.tasks if name not in teacher]:
        file.write_text(json.dumps({**teacher, **scorer.on_tasks(model, lacking)}))
    for path in boundaries(run) if depths is not None else boundaries(run)[-1:]:
        state = checkpoint.read_state(path)
        layers = len(state.record.layers)
        if depths is not None and (layers not in depths or any(row["layers"] == layers for row in found)):
            continue
        model = student_at(path, scorer.teacher.model)
        facts = {
            "layers": layers,
            "left": list(state.record.layers),
            "params": surgery.parameters(model),
            "tokens": state.tokens,
            "seconds": round(sum(row["seconds"] for row in rows if row["tokens"] <= state.tokens)),
        }
        found.append({**facts, **scorer.score(model)})
        print(run.name, {k: round(mean(v), 3) if isinstance(v, list) else v for k, v in found[-1].items()}, flush=True)
    (kept / f"{run.name}.json").write_text(json.dumps(found))
    return found

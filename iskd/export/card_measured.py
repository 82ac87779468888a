"""What a model card says about scores and efficiency, as tables and as the `model-index` that model hubs read.

It is read off evaluation.json and efficiency.json of the run. They may be written, or written again, after the card:
the tables stand between two marks, so that they can be renewed without touching what somebody wrote around them.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, RepoCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index

from iskd.evaluation import TASKS, Efficiency, Evaluation, Interval
from iskd.evaluation.results import TextScore, efficiency_of, evaluation_of
from iskd.export.student_files import CARD
from iskd.plan.run_files import EFFICIENCY_FILE, EVALUATION_FILE
from iskd.system import number, read_json, write_whole
from iskd.system.files import read_plain
from iskd.system.text import ABSENT, percent

_BEGIN, _END = "<!-- measured by iskd -->", "<!-- end of what iskd measured -->"
_BETWEEN = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_MIB = 2**20
_LONGEST = _MIB  # bytes of a card


def measured_section(run_dir: Path | None) -> str:
    """The tables of scores and of efficiency between their marks; nothing but the marks where nothing was measured."""
    evaluation, efficiency = _read(run_dir)
    sections = [*(_scores(evaluation) if evaluation else []), *(_efficiency(efficiency) if efficiency else [])]
    return "\n\n".join([_BEGIN, *sections, _END])


def eval_results(run_dir: Path | None) -> list[EvalResult]:
    """What the student scores by task, for the header's `model-index`; [] without an evaluation."""
    evaluation, _ = _read(run_dir)
    results = []
    for task in evaluation.tasks if evaluation else ():
        if math.isfinite(task.student):
            hub, _, config = (TASKS[task.task].hub if task.task in TASKS else task.task).partition(", ")
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=hub,
                    dataset_name=task.task,
                    dataset_config=config or None,
                    metric_type=task.metric or "score",
                    metric_value=round(task.student, 6),
                )
            )
    return results


def refresh_card(folder: Path, run_dir: Path) -> Path | None:
    """Renew what the card in `folder` says about measurements, and nothing else of it; None where there is no card.

    Raises:
        ValueError: the card's header cannot be read.
    """
    file = folder / CARD
    if not file.is_file():
        return None
    try:
        content = read_plain(file, max_bytes=_LONGEST).decode("utf-8-sig")
        card = RepoCard(content)  # not a ModelCard, which reads the old scores too, and may fail on them
        header = metadata_load(file)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the header of {file} cannot be read ({error!s:.200}): mend it, or export again") from error
    if header is None and card.text != content:
        raise ValueError(f"the header of {file} must hold keys and values: mend it, or export again")
    card.data.pop("model-index")
    if results := eval_results(run_dir):
        title = re.search(r"^# (.+)$", card.text, re.MULTILINE)
        name = title[1] if title else folder.resolve().name
        card.data["model-index"] = eval_results_to_model_index(name, results)
    section = measured_section(run_dir)
    if _BETWEEN.search(card.text):
        card.text = _BETWEEN.sub(lambda _: section, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    return write_whole(file, str(card))


def _read(run_dir: Path | None) -> tuple[Evaluation | None, Efficiency | None]:
    """What the run's two files hold; a card must not fail because one of them is broken."""
    found: list[Any] = []
    for name, parse in ((EVALUATION_FILE, evaluation_of), (EFFICIENCY_FILE, efficiency_of)):
        file = run_dir / name if run_dir else None
        try:
            found.append(parse(read_json(file)) if file and file.is_file() else None)
        except ValueError:
            found.append(None)
    return found[0], found[1]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    cells.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _scores(evaluation: Evaluation) -> list[str]:
    rows = [
        [
            task.task,
            task.metric,
            *(
                percent(value) if task.per_cent else number(value)
                for value in (task.chance, task.teacher, task.student)
            ),
            _interval(task.retention),
            number(task.items),
        ]
        for task in evaluation.tasks
    ]
    means = {f"mean, {kind}": mean for kind, mean in evaluation.retention.items()}
    if len(means) != 1 and math.isfinite(evaluation.mean.value):
        means["mean"] = evaluation.mean
    rows += [[name, "", "", "", "", _interval(mean), ""] for name, mean in means.items()]
    sections = ["## Scores"]
    if rows:
        head = ("task", "metric", "chance %", "teacher %", "student %", "retention % (95 %)", "items")
        sections.append(_table(head, rows))
        sections.append("Retention: the student's score / the teacher's on the same items, with a bootstrap interval.")
    if evaluation.text is not None:
        sections.append(_table(("text", "teacher", "student"), _text_rows(evaluation.text)))
    settings = evaluation.settings
    asked = {key: settings[key] for key in ("device", "precision", "limit", "seed") if key in settings}
    versions = settings.get("versions")
    asked |= {key: value for key, value in versions.items() if value} if isinstance(versions, dict) else {}
    told = ", ".join(f"{key} {_plain(value)}" for key, value in asked.items())
    return [*sections, *([f"Measured with {told}."] if told else [])]


def _text_rows(text: TextScore) -> list[list[str]]:
    return [
        ["perplexity", number(text.teacher_perplexity, 4), number(text.perplexity, 4)],
        ["bits per byte", number(text.teacher_bits_per_byte, 4), number(text.bits_per_byte, 4)],
    ]


def _efficiency(efficiency: Efficiency) -> list[str]:
    both = (efficiency.teacher, efficiency.student)
    rows: list[list[str]] = []

    def add(name: str, values: list[float]) -> None:
        teacher, student = values
        ratio = student / teacher if teacher > 0 else math.nan
        rows.append([name, number(teacher), number(student), ABSENT if math.isnan(ratio) else f"{ratio:.2f}"])

    for name, key, scale in (
        ("parameters (millions)", "params", 1e6),
        ("weights (MiB)", "bytes", _MIB),
        ("peak memory (MiB)", "peak_memory_bytes", _MIB),
    ):
        add(name, [getattr(model, key) / scale if model else math.nan for model in both])
    for length in sorted({found.context for model in both if model for found in model.contexts}):
        at = [model.at(length) if model else None for model in both]
        for name, key, scale in (
            ("prefill of {:,} tokens (ms)", "prefill_seconds", 1e-3),
            ("a token after {:,} (ms)", "decode_seconds_per_token", 1e-3),
            ("cache after {:,} (MiB)", "cache_bytes", _MIB),
        ):
            add(name.format(length), [getattr(found, key) / scale if found else math.nan for found in at])
    machine = efficiency.machine
    told = "; ".join(f"{key} {_plain(value)}" for key, value in machine.items()) if isinstance(machine, dict) else ""
    where = [f"Measured on: {told}."] if told else []
    return ["## Efficiency", _table(("", "teacher", "student", "student / teacher"), rows), *where]


def _interval(found: Interval | None) -> str:
    if found is None:
        return ABSENT
    if not math.isfinite(found.low) or not math.isfinite(found.high):
        return percent(found.value)
    return f"{percent(found.value)} ({percent(found.low)} to {percent(found.high)})"


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)

"""`iskd evaluate`: tasks and text, beside the teacher on the same items."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

from iskd.commands.arguments import hydra_main
from iskd.commands.build.text import shards_of
from iskd.commands.values import as_meant, object_of
from iskd.data import BOS, framing_of, seen_before
from iskd.evaluation import Efficiency, EvalSpec, Evaluation, efficiency, evaluate, refuse_training_text
from iskd.export import load, student_folder, tokenizer_of
from iskd.export.card_measured import refresh_card
from iskd.models.weights import present_weights, weights_sha256
from iskd.plan.run_files import (
    CONFIG_FILE,
    DATA_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    FACTS,
    STAGES_FILE,
    learned_in,
    refuse_strange,
    run_of,
    selected_in,
)
from iskd.plan.saved_config import read_config
from iskd.plan.trainer_settings import with_defaults
from iskd.report import efficiency_table, evaluation_table, write_report
from iskd.report.terminal import print_table, terminal
from iskd.system import Busy, ProgressLine, write_whole
from iskd.system.files import hash_files, read_object, read_plain
from iskd.system.precision import place, serving_dtype
from iskd.teacher import Loaded, load_teacher
from iskd.teacher.origin import find_teacher


@dataclass(frozen=True)
class Found:
    """What `iskd evaluate` found, each None where it was not asked for, and the files that say so."""

    evaluation: Evaluation | None
    efficiency: Efficiency | None
    files: list[Path]


def evaluation(config: DictConfig, folder: Path) -> Found:
    """Evaluate `model` beside `reference`, or beside the teacher that a student was made from.

    Args:
        config: the composed config; `model.path` may be a run, an export or any model's folder.
        folder: where the results go. They also go into the run that the student belongs to, whose report and model card
            are written anew, unless `reference` is another model than the run's teacher.

    Raises:
        ValueError: nothing to load, tokenizers that differ, or as `iskd.evaluation.evaluator.evaluate`.
    """
    config = as_meant(config)
    spec: EvalSpec = object_of(config.eval)
    if spec.every is not None:
        raise ValueError(f"eval.every={spec.every} is of a run; iskd evaluate asks once: set eval.every=null")
    student = _student(config.model.path)
    run = run_of(student)
    named = [each for each in (student, _student(config.reference)) if each is not None]
    chosen_by = [sha for each in named for items in selected_in(run_of(each)).values() for sha in items]
    texts = learned_in(run)
    if spec.text is not None:
        refuse_training_text(spec.text, [text.content for text in texts])
    if run is not None and (run / CONFIG_FILE).is_file():
        read_config(run / CONFIG_FILE)  # its card is written from it at the end, which may be hours away
    if run is not None:
        refuse_strange(run)
    with Busy("loading the models"):
        model, teacher = _models(config, student)
    device, forward_context = place(with_defaults(config.trainer))
    for each in filter(None, (model, teacher)):
        nn.Module.to(each.model.eval(), device)
    # of a student that was kept of a stage the run's page and card do not tell
    last = student is not None and run in (student, student.parent)
    shown = run if run is not None and last and _is_its_teacher(run, teacher) else None
    places, files = [folder, *([shown] if shown else [])], list[Path]()
    found: Evaluation | None = None
    cost: Efficiency | None = None
    if spec.tasks or spec.text or not spec.efficiency_seconds:
        with forward_context():
            found = evaluate(
                model.model, model.tokenizer, spec, teacher,
                exclude=chosen_by, source=model.source, frame=framing_of(model.tokenizer, _bos(config, run)),
                seen=lambda ids: seen_before(
                    ids.numpy(), shards_of(config), [text.cache for text in texts], model.tokenizer
                ),
            )  # fmt: skip
        files += [*([] if shown is None else _kept(shown / EVALUATION_FILE, found.to_json()))]
        files += [write_whole(place / EVALUATION_FILE, found.to_json()) for place in places]
    if spec.efficiency_seconds:
        cost = _cost(model, teacher, spec.efficiency_seconds)
        files += [efficiency.write(place, cost) for place in places]
    if student is not None and shown is not None:
        card = refresh_card(student, shown)
        files += [write_report(shown), *([card] if card else [])]
    return Found(found, cost, files)


def _bos(config: DictConfig, run: Path | None) -> str | None:
    """`data.bos` of the command line, else of the student's run."""
    asked: str | None = config.data.get("bos")
    if asked is not None or run is None:
        return asked
    told = read_object(run / DATA_FILE).get("bos")
    return told if told in BOS else None


def _kept(file: Path, text: str) -> list[Path]:
    """Where a run's earlier evaluation of another kind is put aside: nobody wants to lose hours to ten items."""
    if not file.is_file() or read_plain(file, max_bytes=16 << 20) == text.encode():
        return []
    aside = file.with_name(f"{file.stem}-{hash_files([file])[:8]}.json")
    return [write_whole(aside, file.read_bytes())]


def _cost(model: Loaded, teacher: Loaded | None, seconds: float) -> Efficiency:
    """What both cost in use, as they would be served."""
    models = {} if teacher is None else {"teacher": teacher.model}
    dtype = serving_dtype(model.model.device)
    with ProgressLine() as line:
        return efficiency.measure({**models, "student": model.model}, seconds=seconds, dtype=dtype, progress=line)


def _student(path: str | None) -> Path | None:
    """The folder of the student that is named; None for any other model."""
    if path is None:
        return None
    folder = Path(path)
    if not (folder / STAGES_FILE).is_file() and not (folder / FACTS).is_file():
        return None
    return student_folder(folder)


def _models(config: DictConfig, student: Path | None) -> tuple[Loaded, Loaded | None]:
    """The model, and what it is compared with: `reference`, else a student's own teacher, else nothing."""
    alone, other = config.reference is None and student is None, _student(config.reference)
    if other is not None:
        teacher: Loaded | None = _opened(other, None)
    else:
        teacher = (
            None
            if alone
            else load_teacher(
                find_teacher(student, config.reference), [] if student is None else present_weights(student)
            )
        )
    model = load_teacher(object_of(config.model)) if student is None else _opened(student, teacher)
    return model, teacher


def _opened(student: Path, teacher: Loaded | None) -> Loaded:
    """A student with its own tokenizer, or its teacher's."""
    tokenizer = tokenizer_of(student) or (None if teacher is None else teacher.tokenizer)
    if tokenizer is None:
        raise ValueError(f"{student} has no tokenizer: put that of its teacher beside it, or set reference=TEACHER")
    return Loaded(load(student), tokenizer, {"kind": "student", "sha256": weights_sha256(student)})


def _is_its_teacher(run: Path, teacher: Loaded | None) -> bool:
    """Whether the weights are those of the run's own teacher, as far as the run says whose they are."""
    told = read_object(run / ENVIRONMENT_FILE).get("teacher")
    sha256 = told.get("sha256") if isinstance(told, dict) else None
    return teacher is not None and sha256 in (None, teacher.source.get("sha256"))


def main() -> None:
    """The command of this process; without `eval=` it is a quick one.

    Raises ValueError where no model is named: nobody means the preset that a run would take.
    """
    words = sys.argv[1:]
    shows = any(word[:1] == "-" and word not in ("-m", "--multirun") for word in words)
    if not shows and not any(word.startswith(("model=", "model.path=", "model.name=")) for word in words):
        raise ValueError("which model? set model=RUN_DIR, the folder of an export or of any model, or OWNER/NAME")
    if not any(argument.startswith("eval=") for argument in sys.argv):
        sys.argv.append("eval=quick")
    _main()


@hydra_main
def _main(config: DictConfig) -> None:
    found = evaluation(config, Path(HydraConfig.get().runtime.output_dir))
    console = terminal()
    if found.evaluation is not None:
        print_table(evaluation_table(found.evaluation), spare=("chance %", "metric", "items"), console=console)
    if found.efficiency is not None:
        print_table(efficiency_table(found.efficiency), console=console)
    for file in found.files:
        console.print(f"written: {file}", soft_wrap=True)

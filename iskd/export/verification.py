"""`iskd verify DIR`: open an exported student in a clean process, compare what it says, let it write, and time it.

The process knows nothing of the one that made the student; for a native export iskd cannot be imported in it. No code
that lies beside the weights is run, in either process, but for one kind: the code of `export.code=bundle`, where it is
word for word what this version of iskd writes for the record. A third process then opens the student by it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.export.bundle import bundled
from iskd.export.card import edits_in_words
from iskd.export.loading import Described, describe, load
from iskd.export.probe import Probe, Reopened, ask, differences, probe_from_json, reopen
from iskd.export.student_files import CODE, read_facts, student_folder, tokenizer_of
from iskd.models.tokenizers import SENTENCE
from iskd.models.weights import stored_dtype, weight_files
from iskd.plan.reading import record_from_json
from iskd.plan.run_files import FACTS, RECORD_FILE
from iskd.system import Json, file_sha256, read_json
from iskd.system.faults import RunError
from iskd.system.files import read_plain
from iskd.system.version import __version__

_SPOKEN = 24
_MAX_CODE = 1 << 22  # bytes


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        folder: the export.
        kind: "native" (plain transformers loads it) or "iskd".
        what: the kind and the edits in words.
        problems: why it fails; empty where it passes.
        notes: what could not be compared, and why.
        parameters: how many numbers the model has; 0 when it did not load.
        weight_files, weight_bytes: of its safetensors.
        stored: the type that most of its weights have there.
        largest_difference: of logits from the expected ones; None when there was nothing to compare with.
        tolerance: how large it may be.
        text: a prompt and its greedy continuation.
        seconds: of `load`, `prefill` and `decode` on this machine's CPU in float32.
        tokens: of `prefill` and `decode`.
        threads: of the CPU.
    """

    folder: Path
    kind: str
    what: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    parameters: int
    weight_files: int
    weight_bytes: int
    stored: str
    largest_difference: float | None
    tolerance: float | None
    text: str
    seconds: Mapping[str, float]
    tokens: Mapping[str, int]
    threads: int

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def lines(self) -> list[str]:
        """The result for a terminal, one fact a line."""
        found = [f"{self.folder}", *(f"  {line}" for line in self.what)]
        files = "file" if self.weight_files == 1 else "files"
        size = f"{self.weight_bytes / 1e6:,.1f} MB of {self.stored}"
        found.append(f"  {self.parameters:,} parameters, {size} in {self.weight_files} weight {files}")
        if self.largest_difference is not None and self.tolerance is not None:
            found.append(f"  logits: largest difference {self.largest_difference:.2g}, allowed {self.tolerance:.2g}")
        if self.text:
            found.append(f"  text: {self.text!r}")
        if "load" in self.seconds:
            found.append(f"  loading: {self.seconds['load']:.2f} s in a clean process")
        for name in self.tokens:
            count, taken = self.tokens[name], self.seconds[name]
            found.append(
                f"  {name}: {count / taken:,.1f} tokens/s ({count} tokens in {taken:.3f} s, "
                f"CPU, float32, {self.threads} threads, batch of 1)"
            )
        found += [f"  note: {note}" for note in self.notes]
        return [*found, *(f"  FAILED: {problem}" for problem in self.problems), *(["  passed"] * self.passed)]


def verify(
    folder: str | os.PathLike[str],
    reference: PreTrainedModel | str | os.PathLike[str] | None = None,
    *,
    timed: bool = True,
) -> Verification:
    """Open an exported student again and say whether it is what it was.

    Args:
        folder: an export, or the run that holds it; any folder with a model of a known family can be checked, with less
            to compare.
        reference: compare with this model, or with the student in this folder, instead of with what the export recorded
            when it was made.
        timed: also measure prefill and decode.

    Raises:
        ValueError: the folder is not a model, or its files do not belong together; see `iskd.export.loading.describe`.
    """
    path = student_folder(Path(folder))
    described = describe(path)
    facts = read_facts(path)
    expected, notes = _expected(path, facts, reference)
    problems = changed(path, facts)
    tokenizer = tokenizer_of(path)
    question = _question(described) if expected is None else expected
    prompt = _prompt(tokenizer, int(described.config.vocab_size)) or question.ids[0][:4]
    found, largest = Reopened(question), None
    try:
        found = reopen(path, question, native=described.native, prompt=prompt, spoken_tokens=_SPOKEN, timed=timed)
    except RunError as error:
        problems.append(str(error))
    else:
        problems += [f"the weights lack {name}" for name in found.missing]
        problems += _not_finite(found.probe)
        if expected is not None:
            different, largest = differences(expected, found.probe)
            problems += different
        if described.code == "bundle":
            wrong, told = _by_its_own_code(described, expected or found.probe)
            problems += wrong
            notes += told
    weights = weight_files(path)
    return Verification(
        folder=path,
        kind="native" if described.native else "iskd",
        what=_what(described),
        problems=tuple(problems),
        notes=tuple(notes),
        parameters=found.parameters,
        weight_files=len(weights),
        weight_bytes=sum(file.stat().st_size for file in weights),
        stored=stored_dtype(path),
        largest_difference=largest,
        tolerance=expected.tolerance if expected is not None else None,
        text=_text(tokenizer, found.spoken),
        seconds=found.seconds,
        tokens=found.tokens,
        threads=found.threads,
    )


def _expected(
    folder: Path, facts: Json, reference: PreTrainedModel | str | os.PathLike[str] | None
) -> tuple[Probe | None, list[str]]:
    """The answer to compare with, and what to tell where there is none."""
    if isinstance(reference, PreTrainedModel):
        return ask(reference), []
    if reference is not None:
        return ask(load(reference)), []
    if "probe" in facts:
        return probe_from_json(facts["probe"], folder / FACTS), []
    return None, [f"{FACTS} is not there, so the logits were compared with nothing; give a reference"]


def _by_its_own_code(described: Described, expected: Probe) -> tuple[list[str], list[str]]:
    """Problems of the student as the code beside it opens it where iskd is not, and what to tell besides."""
    file = described.folder / CODE
    if not file.is_file():
        return [f"{CODE}, its code for where iskd is not installed, is not there"], []
    try:
        text = read_plain(file, max_bytes=_MAX_CODE).decode("utf-8", errors="replace")
    except (OSError, ValueError) as error:
        return [str(error)], []
    if text != bundled(described.record, __version__):
        return [], [f"{CODE} is not what iskd {__version__} writes for this student, so it was not run"]
    try:
        found = reopen(described.folder, expected, native=False, bundle=True)
    except RunError as error:
        return [f"by {CODE}, where iskd is not installed: {error}"], []
    problems = [f"by {CODE}: {problem}" for problem in differences(expected, found.probe)[0]]
    return problems, [] if problems else [f"{CODE} opens it where iskd is not installed, with the same answers"]


def _question(described: Described) -> Probe:
    """Some input for a model of which nothing is known."""
    vocabulary = int(described.config.vocab_size)
    ids = [[(7 * row + 31 * column) % vocabulary for column in range(16)] for row in range(2)]
    return Probe(ids, [0], [], [], [], math.inf, math.inf)


def changed(folder: Path, facts: Json) -> list[str]:
    """Weight files and code that are not those of the export, in words."""
    recorded, code = facts.get("weights", {}), facts.get("code")
    if not isinstance(recorded, dict) or not all(isinstance(entry, dict) for entry in recorded.values()):
        raise ValueError(f"{folder / FACTS}: weights must be an object of objects: export the student again")
    found = {file.name: file for file in weight_files(folder)}
    problems = [f"{name} was not part of the export" for name in found if recorded and name not in recorded]
    for name, entry in recorded.items():
        if name not in found:
            problems.append(f"{name} of the export is not there")
        elif (size := found[name].stat().st_size) != entry.get("bytes"):
            problems.append(f"{name} has {size:,} bytes, the export wrote {entry.get('bytes')!r:.30}")
        elif file_sha256(found[name]) != entry.get("sha256"):
            problems.append(f"{name} was changed after it was exported: its sha256 is another")
    file = folder / CODE
    if isinstance(code, dict) and file.is_file() and file_sha256(file) != code.get(CODE):
        problems.append(f"{CODE} was changed after it was exported: its sha256 is another")
    return problems


def _not_finite(probe: Probe) -> list[str]:
    sums = [value for row in probe.logsumexp for value in row]
    return [] if all(math.isfinite(value) for value in sums) else ["its logits are not finite"]


def _what(described: Described) -> tuple[str, ...]:
    kind, depth = described.config.model_type, described.config.num_hidden_layers
    file = described.folder / RECORD_FILE
    record = record_from_json(read_json(file, links=True)) if file.is_file() else described.record
    if described.native:
        head = f"native: plain transformers loads it, as {kind} with {depth} layers"
    else:
        head = f"model_type iskd: iskd loads it, on a {kind} skeleton with {depth} layers"
    return (head, *(edits_in_words(record) if file.is_file() or not described.native else ()))


def _prompt(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> list[int]:
    """The sentence as tokens, [] where that cannot be."""
    ids: list[int] = [] if tokenizer is None else list(tokenizer(SENTENCE)["input_ids"])
    return ids if all(token < vocabulary for token in ids) else []


def _text(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    try:
        return str(tokenizer.decode(list(ids))) if tokenizer is not None else f"tokens {' '.join(map(str, ids))}"
    except (OverflowError, TypeError, ValueError, IndexError):
        return f"tokens {' '.join(map(str, ids))}"

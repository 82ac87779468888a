"""`iskd generate DIR PROMPT`: what the teacher and the student make of the same prompt, side by side, and how fast."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.commands.line import parse
from iskd.data import framing_of
from iskd.evaluation.speaking import Spoken, speak
from iskd.export import load, read_facts, student_folder, tokenizer_of
from iskd.models import Stack
from iskd.models.tokenizers import SENTENCE, check_same_tokenizer
from iskd.models.weights import present_weights
from iskd.report.terminal import terminal, title
from iskd.system import Busy
from iskd.system.precision import device_of
from iskd.teacher import Loaded, load_teacher
from iskd.teacher.origin import find_teacher


@dataclass(frozen=True)
class SideBySide:
    """Two continuations of one prompt.

    Attributes:
        prompt: as given.
        prompt_tokens: how many tokens that is.
        teacher, student: what they said.
        how: greedy, or the temperature and the seed.
        notes: what a reader should know about the comparison.
    """

    prompt: str
    prompt_tokens: int
    teacher: Spoken
    student: Spoken
    how: str
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> int:
        """How many tokens they agree on before they part."""
        pairs = zip(self.teacher.ids, self.student.ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.teacher.ids), len(self.student.ids)))

    def table(self) -> Table:
        """Both texts in two columns."""
        table = Table(title=title(f"{self.how}, {self.prompt_tokens} tokens of prompt"), expand=True, padding=(0, 1))
        for role, spoken in (("teacher", self.teacher), ("student", self.student)):
            table.add_column(Text(f"{role}: {spoken.name}"), ratio=1, overflow="fold")
        table.add_row(*(Text.assemble((self.prompt, "dim"), said.text) for said in (self.teacher, self.student)))
        table.add_section()
        table.add_row(*(f"{len(s.ids)} tokens, {s.tokens_per_s:,.1f} tokens/s" for s in (self.teacher, self.student)))
        table.caption = f"the first {self.same} tokens are the same"
        if self.teacher.ids:
            faster = self.student.tokens_per_s / self.teacher.tokens_per_s
            table.caption += f"; the student is {faster:.2f} times as fast"
        return table


@torch.no_grad()
def generate(
    student: str | Path | PreTrainedModel,
    teacher: str | Path | Loaded | None = None,
    prompt: str = SENTENCE,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    bos: str | None = None,
) -> SideBySide:
    """Let teacher and student continue the same prompt, each as it was loaded (float32 unless said otherwise).

    Each goes as far as it can (`Stack.limit`): a student without attention goes on where its teacher has to stop, and
    speaks alone where the prompt is too long for the teacher; a note says so.

    Args:
        student: folder of an export or of a run, or a model.
        teacher: a folder, a name on the hub, a bundled teacher's key, or a loaded teacher. None finds it through the
            run that the export lies in, else through what the export says about it.
        prompt: text to continue.
        tokenizer: the student's; None takes the one in its folder, else the teacher's.
        max_new_tokens: how many at most; each stops at its end-of-text token.
        temperature: 0 takes the most likely token; above, tokens are drawn from the softmax at that temperature.
        seed: of the drawing, the same for both.
        device: where to compute; "auto" takes a GPU if there is one.
        bos: what stands before the prompt (`data.bos`, `iskd.data.framing`); None = what the tokenizer puts there.

    Raises:
        ValueError: the teacher cannot be found, the tokenizers differ, or prompt and tokens are more than the student
            can take; no such device.
    """
    _check(prompt, max_new_tokens, temperature)
    folder = None if isinstance(student, PreTrainedModel) else student_folder(Path(student))
    if isinstance(teacher, Loaded):
        loaded = teacher
    else:
        loaded = load_teacher(find_teacher(folder, teacher), present_weights(folder) if folder else [])
    own = tokenizer or (tokenizer_of(folder) if folder else None) or loaded.tokenizer
    check_same_tokenizer(own, loaded.tokenizer, [prompt])
    # what frames a text behind it would tell the model that it is over
    front = framing_of(own, bos).front
    ids = torch.tensor([[*front, *own(prompt, add_special_tokens=False)["input_ids"]]])
    model = student if isinstance(student, PreTrainedModel) else load(student_folder(Path(student)))
    name = "this model" if isinstance(student, PreTrainedModel) else str(student)
    for who in (loaded.model, model):
        _check_rows(who, ids)
    _check_fits(model, ids, max_new_tokens)
    room = Stack(loaded.model).limit
    most = max_new_tokens if room is None else min(max_new_tokens, max(0, room - ids.shape[1]))
    place = device_of(device)
    options: dict[str, Any] = {"do_sample": False}
    how = "greedy"
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        how = f"temperature {temperature:g}, seed {seed}"
    said = [
        speak(who, label, own, ids.to(place), {**options, "max_new_tokens": tokens}, seed)
        for who, label, tokens in ((loaded.model, str(loaded.source["name"]), most), (model, name, max_new_tokens))
    ]
    notes = _notes(folder, loaded)
    if most < max_new_tokens:
        notes += (
            f"the teacher says at most {most} tokens: with the prompt more would be over {Stack(loaded.model).bound}",
        )
    return SideBySide(prompt, ids.shape[1], said[0], said[1], f"{how}, {place.type}", notes)


def _check(prompt: str, max_new_tokens: int, temperature: float) -> None:
    if not prompt:
        raise ValueError("the prompt is empty: give some text to continue")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive number")


def _check_rows(model: PreTrainedModel, ids: Tensor) -> None:
    rows, largest = int(model.config.vocab_size), int(ids.max())
    if largest >= rows:
        raise ValueError(f"the tokenizer has token {largest}, the model only {rows} rows: they do not belong together")


def _check_fits(student: PreTrainedModel, ids: Tensor, new_tokens: int) -> None:
    stack = Stack(student)
    if stack.limit is not None and ids.shape[1] + new_tokens > stack.limit:
        raise ValueError(
            f"{ids.shape[1]} tokens of prompt and {new_tokens} new ones are more than {stack.bound}: "
            "shorten the prompt or lower the number of new tokens (--tokens)"
        )


def _notes(folder: Path | None, loaded: Loaded) -> tuple[str, ...]:
    source = read_facts(folder).get("teacher") if folder is not None else None
    made_from = source.get("sha256") if isinstance(source, dict) else None
    if made_from and made_from != loaded.source.get("sha256"):
        return ("this is not the teacher that the student was made from: its weights have another sha256",)
    return ()


def run(argv: Sequence[str]) -> None:
    """The command line of `iskd generate`. Raises as `generate`."""
    main(parse(["generate", *argv]).values)


def main(asked: Namespace) -> None:
    """Print both continuations. Raises as `generate`."""
    prompt = SENTENCE if asked.prompt is None else asked.prompt
    how: dict[str, Any] = {
        "max_new_tokens": asked.tokens,
        "temperature": asked.temperature,
        "seed": asked.seed,
        "device": asked.device,
    }
    how["bos"] = asked.bos
    with Busy("loading teacher and student"):
        found = generate(asked.folder, asked.teacher, prompt, **how)
    console = terminal()
    console.print(found.table())
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)

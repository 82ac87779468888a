"""What a model makes of a prompt, and what student and teacher make of the same ones: samples.json of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.models import Stack
from iskd.models.tokenizers import SENTENCE
from iskd.plan.run_files import SAMPLES_FILE
from iskd.system import write_whole
from iskd.system.reading import read_as

PROMPTS = (
    SENTENCE,
    "The capital of France is",
    "To make a good cup of tea,",
    "def fibonacci(n):",
    "The three most important things in life are",
)
"""What both models continue at the end of a run, the first ones first."""
_NEW_TOKENS = 48
_MOST = 50


@dataclass(frozen=True)
class Spoken:
    """What one model said.

    Attributes:
        name: who.
        ids: tokens after the prompt.
        text: the same, decoded.
        seconds: for the prompt and all of them.
    """

    name: str
    ids: tuple[int, ...]
    text: str
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, the prompt's time included; 0 for a model that could say nothing."""
        return len(self.ids) / self.seconds if self.ids else 0.0


@torch.no_grad()
def speak(
    model: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    options: dict[str, Any],
    seed: int,
) -> Spoken:
    """One model's continuation. A first token is made before the clock starts: nobody waits for it twice."""
    if not options["max_new_tokens"]:
        return Spoken(name, (), "", 0.0)
    was_training = model.training
    nn.Module.to(model.eval(), ids.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    call: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": padding}

    def finite(_: Tensor, logits_BV: Tensor) -> Tensor:  # the largest of what is nan is any token
        if bool(logits_BV.isnan().any()):
            raise ValueError(f"{name} gives nan for the next token: its weights are broken")
        return logits_BV

    call["logits_processor"] = [finite]
    try:
        with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
            cast(Any, model).generate(ids, **call, max_new_tokens=1, do_sample=False)
            torch.manual_seed(seed)
            start = time.perf_counter()
            sequence: Tensor = cast(Any, model).generate(ids, **call, **options)
            new = tuple(int(token) for token in sequence[0, ids.shape[1] :].tolist())  # waits for a GPU
            seconds = time.perf_counter() - start
    finally:
        model.train(was_training)
    return Spoken(name, new, str(tokenizer.decode(list(new), skip_special_tokens=True)), seconds)


_Text = Annotated[str, Field(max_length=20_000)]


@dataclass(frozen=True)
class Sample:
    """One prompt and what both models made of it, each taking its most likely token.

    Attributes:
        prompt: as given.
        teacher, student: their texts.
        same: tokens on which they agree before they part.
        tokens: of the student.
    """

    prompt: _Text
    teacher: _Text
    student: _Text
    same: int = 0
    tokens: int = 0


def samples(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    front: Sequence[int],
    count: int,
) -> list[Sample]:
    """Let both continue the first `count` prompts. Models in shards: a collective.

    Args:
        student: on the teacher's device; where both know documents apart, a prompt is one of them.
        teacher: the original.
        tokenizer: of both.
        front: tokens before every prompt.
        count: how many prompts.
    """
    rooms = [limit for model in (student, teacher) if (limit := Stack(model).limit) is not None]
    found = []
    for prompt in PROMPTS[:count]:
        ids = torch.tensor([[*front, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        new = min([_NEW_TOKENS, *(room - ids.shape[1] for room in rooms)])
        if new < 1:
            continue
        options = {"do_sample": False, "max_new_tokens": new}
        theirs, ours = (
            speak(model, name, tokenizer, ids.to(model.device), options, 0)
            for name, model in (("the teacher", teacher), ("the student", student))
        )
        same = next((at for at, pair in enumerate(zip(theirs.ids, ours.ids, strict=False)) if len({*pair}) > 1), new)
        found.append(Sample(prompt, theirs.text, ours.text, min(same, len(ours.ids), len(theirs.ids)), len(ours.ids)))
    return found


def write_samples(folder: Path, found: Sequence[Sample]) -> Path:
    """Write what both models said into the folder of a run."""
    return write_whole(folder / SAMPLES_FILE, json.dumps([asdict(sample) for sample in found], indent=1))


def samples_of(value: Any) -> list[Sample]:
    """What samples.json holds. Raises ValueError where it is no list of samples."""
    if not isinstance(value, list):
        raise ValueError(f"{SAMPLES_FILE} must hold a list, got {type(value).__name__}")
    return [read_as(Sample, item, SAMPLES_FILE, others=True) for item in value[:_MOST]]

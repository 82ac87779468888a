"""What a model says to a small fixed input, and the same question put to an exported folder in a clean process.

The answer travels with the export, so that anybody can check later, on another machine, that the folder still says it.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.plan.edits import allowed
from iskd.system import Json, write_whole
from iskd.system.faults import RunError
from iskd.system.files import scratch
from iskd.system.reading import Number, read_as

ROWS, TOKENS, PROMPT, NEW, COLUMNS = 2, 16, 4, 8, 64
_TOLERANCE = 1e-4  # of the largest logit: sums in another order differ by less, a wrong weight by more
_TIMEOUT_S = 1_800
_MOST_TOKENS = 65_536


def _margin(saved: Any) -> Any:
    return math.inf if saved is None else saved


@dataclass(frozen=True)
class Probe:
    """An input and the answer to it, float32 on a CPU.

    Attributes:
        ids: tokens [R, T] of the input.
        columns: vocabulary entries [K] whose logits are kept.
        logits: of these at the last position of each row [R, K].
        logsumexp: over the whole vocabulary at every position [R, T]: every logit counts.
        text: the first 4 tokens of each row and their greedy continuation.
        margin: the smallest lead of a chosen token over the next one in that text, in logits.
        tolerance: the largest difference of logits that says nothing.
    """

    ids: list[list[int]]
    columns: list[int]
    logits: list[list[Number]]
    logsumexp: list[list[Number]]
    text: list[list[int]]
    margin: Annotated[Number, BeforeValidator(_margin)]
    tolerance: Number

    def to_json(self) -> Json:
        """Plain JSON; an infinite margin (one choice only) is null."""
        return {**asdict(self), "margin": self.margin if math.isfinite(self.margin) else None}


@dataclass(frozen=True)
class Reopened:
    """What a clean process found in a folder.

    Attributes:
        probe: its answer to the input it was given.
        missing: parameters that the weights lack.
        parameters: how many numbers the model has.
        spoken: the prompt and its greedy continuation, token ids.
        seconds: of `load`; where timed, also `prefill` and `decode`.
        tokens: timed tokens of `prefill` and `decode`.
        threads: of the CPU.
    """

    probe: Probe
    missing: list[str] = field(default_factory=list)
    parameters: int = 0
    spoken: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    threads: int = 1


def probe_from_json(data: Any, where: Path) -> Probe:
    """Inverse of `Probe.to_json`. Raises ValueError on a file that no export wrote."""
    try:
        probe = read_as(Probe, data, "probe", others=True)
    except ValueError as error:
        raise ValueError(f"{where}: the probe cannot be read ({error!s:.200}): export the student again") from None
    ids, sums, logits, columns = probe.ids, probe.logsumexp, probe.logits, probe.columns
    lengths = [sorted({len(row) for row in rows}) for rows in (ids, sums, logits, [columns])]
    if lengths[0] != lengths[1] or lengths[2] != lengths[3] or not len(ids) == len(sums) == len(logits) > 0:
        raise ValueError(f"{where}: the probe's lists do not fit each other: export the student again")
    if len(lengths[0]) != 1 or not 0 < len(ids) * lengths[0][0] <= _MOST_TOKENS or not columns:
        raise ValueError(f"{where}: the probe has rows of {lengths[0]!r:.80} tokens: export the student again")
    return probe


@torch.no_grad()
def ask(model: PreTrainedModel, ids: Sequence[Sequence[int]] | None = None, columns: Sequence[int] = ()) -> Probe:
    """What `model` says to `ids` [R, T] (default: 2 x 16 random tokens, the same for every model of its vocabulary)."""
    # a near-tie in the text must not depend on the device, nor the logits on the precision of training
    if next(model.parameters()).device.type != "cpu" or next(model.parameters()).dtype != torch.float32:
        model = copy.deepcopy(model)
        nn.Module.to(model, "cpu", torch.float32)
    vocabulary = int(model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, vocabulary, (ROWS, TOKENS), generator=generator) if ids is None else torch.tensor(ids)
    kept = list(columns) or sorted({index * vocabulary // COLUMNS for index in range(COLUMNS)})
    logits: Tensor = model(input_ids).logits.float()
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    said = cast(Any, model).generate(input_ids[:, :PROMPT], **options, return_dict_in_generate=True, output_scores=True)
    return Probe(
        ids=input_ids.tolist(),
        columns=kept,
        logits=logits[:, -1, kept].tolist(),
        logsumexp=logits.logsumexp(-1).tolist(),
        text=said.sequences.tolist(),
        margin=min(float((top[:, 0] - top[:, 1]).min()) for top in (score.topk(2).values for score in said.scores)),
        tolerance=_TOLERANCE * max(1.0, float(logits.abs().max())),
    )


def differences(expected: Probe, found: Probe) -> tuple[list[str], float]:
    """What is not the same, in words, and the largest difference of logits (nan where a logit is not finite)."""
    pairs = ((expected.logits, found.logits), (expected.logsumexp, found.logsumexp))
    largest = max((float((torch.tensor(a) - torch.tensor(b)).abs().max()) for a, b in pairs), key=_nan_last)
    problems = []
    if not largest <= expected.tolerance:
        problems.append(
            f"it gives other logits after loading: largest difference {largest:.3g}, allowed {expected.tolerance:.3g}"
        )
    # a near-tie may fall the other way on another machine
    if expected.text != found.text and min(expected.margin, found.margin) > 2 * expected.tolerance:
        problems.append("it generates another greedy text after loading")
    return problems, largest


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


# The process that opens the folder. A native student, and one by the code beside its weights, gets one in which an
# import of iskd fails; code beside weights is run only where the caller knows that iskd wrote it.
_CHILD = """
import json, sys, time
import torch
question = json.load(open(sys.argv[1]))
options = {"dtype": torch.float32, "local_files_only": True}
if question["bundle"] or question["native"]:
    sys.modules["iskd"] = None
if question["native"]:
    options |= {"use_safetensors": True, "output_loading_info": True}
elif not question["bundle"]:
    import iskd
    for prefix in question["allowed"]:
        iskd.plan.allow(prefix)
from transformers import AutoModelForCausalLM
start = time.perf_counter()
found = AutoModelForCausalLM.from_pretrained(question["folder"], trust_remote_code=question["bundle"], **options)
load = time.perf_counter() - start
model, report = found if question["native"] else (found, {"missing_keys": []})
model.eval()
ids, greedy = torch.tensor(question["ids"]), {"do_sample": False, "pad_token_id": 0}

def timed(run):
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[1]

def say(prompt, least, most):
    return model.generate(prompt, min_new_tokens=least, max_new_tokens=most, **greedy)

with torch.no_grad():
    logits = model(ids).logits
    said = model.generate(ids[:, :question["prompt_tokens"]], max_new_tokens=question["new_tokens"], **greedy,
                          return_dict_in_generate=True, output_scores=True)
    spoken, seconds, tokens = [], {"load": load}, {}
    if question["spoken_tokens"]:
        spoken = say(torch.tensor([question["prompt"]]), 0, question["spoken_tokens"])[0].tolist()
    if question["timed"]:
        context = getattr(model.config, "max_position_embeddings", None) or 256
        longer = ids[:1].repeat(1, 8)[:, : max(1, context // 2)]
        count = max(1, min(16, context - longer.shape[1] - 1))
        tokens = {"prefill": longer.shape[1], "decode": count}
        seconds["prefill"] = timed(lambda: model(longer, use_cache=True))
        first = timed(lambda: say(longer, 1, 1))
        seconds["decode"] = max(timed(lambda: say(longer, count + 1, count + 1)) - first, 1e-9)
tops = [score.topk(2).values for score in said.scores]
answer = {
    "logits": logits[:, -1, question["columns"]].tolist(), "logsumexp": logits.logsumexp(-1).tolist(),
    "text": said.sequences.tolist(), "margin": min((top[:, 0] - top[:, 1]).min().item() for top in tops),
    "missing": sorted(report["missing_keys"]), "parameters": sum(p.numel() for p in model.parameters()),
    "spoken": spoken, "seconds": seconds, "tokens": tokens, "threads": torch.get_num_threads(),
}
json.dump(answer, open(sys.argv[1], "w"))
"""


def reopen(
    folder: Path,
    probe: Probe,
    *,
    native: bool,
    bundle: bool = False,
    prompt: Sequence[int] = (),
    spoken_tokens: int = 0,
    timed: bool = False,
) -> Reopened:
    """Open `folder` in a process that knows nothing of this one, and put the input of `probe` to it.

    Args:
        folder: an exported student.
        probe: its input is used.
        native: plain transformers opens it, in a process in which iskd cannot be imported.
        bundle: so does the code beside its weights, which is run: only for code that iskd wrote.
        prompt: token ids of a text to continue.
        spoken_tokens: by how many tokens.
        timed: also measure prefill and decode: the median of three.

    Raises:
        RunError: the folder does not load, or the model cannot be run in time; with the last line of what was said.
    """
    question = {"folder": str(folder.resolve()), "native": native, "bundle": bundle}
    question |= {"allowed": allowed(), "timed": timed}
    question |= {"ids": probe.ids, "columns": probe.columns, "prompt_tokens": PROMPT, "new_tokens": NEW}
    question |= {"prompt": list(prompt), "spoken_tokens": spoken_tokens if len(prompt) else 0}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": os.pathsep.join(_paths())}
    with scratch("iskd-probe") as place:
        file = place / "probe.json"
        write_whole(file, json.dumps(question))
        command = [sys.executable, "-c", _CHILD, str(file)]
        try:
            run = subprocess.run(
                command,
                # a process finds modules in its working directory first, and the one here may be a downloaded folder
                cwd=place,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                env={**os.environ, **quiet, "HF_MODULES_CACHE": str(place)},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"it gave no answer in a fresh process within {_TIMEOUT_S} seconds") from None
        if run.returncode:
            said = run.stderr.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
            raise RunError(f"it does not load in a fresh process: {said[0]:.500}")
        found = json.loads(file.read_text())
    answer = {**asdict(probe), **{key: found.pop(key) for key in ("logits", "logsumexp", "text", "margin")}}
    return Reopened(probe=Probe(**answer), **found)


def _paths() -> list[str]:
    """Where a process finds iskd and what this one can import.

    The working directory, where an interactive session finds modules, counts only for a package that `allow` named,
    after all others.
    """
    here, packages = Path.cwd(), {prefix.partition(".")[0] for prefix in allowed()} - {"iskd"}
    found = [str(Path(__file__).parents[2]), *(os.path.abspath(place) for place in sys.path if place)]
    theirs = any((here / name).is_dir() or (here / f"{name}.py").is_file() for name in packages)
    return [*found, str(here)] if "" in sys.path and theirs else found

"""A student on disk that others can load: written, then reopened in a fresh process before it counts.

A student that some config of the teacher's own architecture describes (nothing edited, layers removed, all layers
slimmed to the same sizes) is written with that config and loads with plain transformers. Any other is written with
`model_type: iskd`, its record and its teacher's config; it loads with `iskd.load(dir)`, or with
`AutoModelForCausalLM.from_pretrained(dir)` after `import iskd`, or with `trust_remote_code=True`, which runs
`modeling_iskd.py` beside the weights: a few lines that import iskd or, with `export.code=bundle`, all that is needed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from iskd.export.card import write_card
from iskd.export.probe import Probe, ask, differences, reopen
from iskd.export.storage import Rounding, rounded, rounding_of
from iskd.export.student import MAX_SHARD_BYTES, _versions, why_not_native, write
from iskd.export.student_files import CODE
from iskd.models.weights import weight_files
from iskd.plan import Record
from iskd.plan.run_files import FACTS
from iskd.system import Json, file_sha256, write_whole
from iskd.system.faults import RunError
from iskd.system.files import clear_place, draft_of, sweep

_log = logging.getLogger(__name__)


@torch.no_grad()
def export(
    target: Path,
    model: PreTrainedModel,
    record: Record,
    teacher_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    verify: bool = True,
    teacher: Mapping[str, Any] | None = None,
    run_dir: Path | None = None,
    max_shard_bytes: int | str = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    text: Tensor | None = None,
    code: str = "iskd",
) -> Path:
    """Write a student to `target`, replacing an earlier export, and reopen it in a fresh process.

    Beside the student lie a model card and `export.json`: what the student says to a fixed input, the hashes of its
    weights, its teacher and the versions that made it. `iskd.export.verification` compares with it.

    Args:
        target: folder of the export.
        model: the student.
        record: its edits.
        teacher_config: config of its teacher.
        tokenizer: written beside it.
        verify: whether to reopen it now.
        teacher: where the teacher came from, `iskd.teacher.load.Loaded.source`.
        run_dir: folder of the run, from whose files the card is written.
        max_shard_bytes: of one weights file, as a number or as text such as "5GB".
        dtype: in which weights are stored (`iskd.export.storage`); None = as they are.
        text: windows [B, T] of the run's validation text, on which rounding is measured; None = random tokens.
        code: beside a student that plain transformers cannot load: "iskd" imports the package, "bundle" needs it not.

    Raises:
        ValueError: a weight is larger than `dtype` holds.
        RunError: the reopened student does not load, or gives other logits or another greedy text; `target` stays as
            it was.
    """
    was_training = model.training
    model.eval()
    sweep(target.parent)
    draft = draft_of(target)
    try:
        stored, changed = rounded(model, dtype or model.dtype)
        native = write(draft, stored, record, teacher_config, tokenizer, max_shard_bytes=max_shard_bytes, code=code)
        why = "" if native else why_not_native(stored)
        if why:
            _log.info("transformers alone cannot load the student, iskd does: %s", why)
        probe = ask(stored)
        words = "random tokens" if text is None else "validation text"
        windows_BT = torch.tensor(probe.ids) if text is None else text
        rounding = rounding_of(model, stored, dtype or model.dtype, changed, windows_BT, words)
        del stored
        _write_facts(draft, probe, teacher or {}, rounding, native=native)
        write_card(
            draft,
            record,
            native=native,
            bundle=code == "bundle",
            why=why,
            model_type=teacher_config.model_type,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            versions=_versions(),
            teacher=teacher,
            run_dir=run_dir,
            rounding=rounding,
        )
        if verify:
            _verify(draft, target, probe, native=native)
            if code == "bundle" and not native:
                _verify(draft, target, probe, native=native, bundle=True)
    except Exception:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        model.train(was_training)
    clear_place(target)
    os.replace(draft, target)
    return target


def _write_facts(
    folder: Path, probe: Probe, teacher: Mapping[str, Any], rounding: Rounding | None = None, *, native: bool
) -> None:
    facts: Json = {
        "kind": "native" if native else "iskd",
        "versions": _versions(),
        # a folder of this machine says nothing elsewhere
        "teacher": {key: value for key, value in teacher.items() if key != "path"},
        "weights": {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in weight_files(folder)
        },
        **({} if rounding is None else {"storage": rounding.to_json()}),
        **({"code": {CODE: file_sha256(folder / CODE)}} if (folder / CODE).is_file() else {}),
        "probe": probe.to_json(),
    }
    write_whole(folder / FACTS, json.dumps(facts, indent=1))


def _verify(draft: Path, target: Path, probe: Probe, *, native: bool, bundle: bool = False) -> None:
    """Equal logits and equal greedy text in a process that knows nothing of this one."""
    try:
        found = reopen(draft, probe, native=native, bundle=bundle)
        problems = [*(f"the weights lack {name}" for name in found.missing), *differences(probe, found.probe)[0]]
    except RunError as error:
        problems = [str(error)]
    if problems:
        raise RunError(
            f"the exported student cannot be trusted, so nothing was written to {target}: {problems[0]}. Nothing "
            "else is lost: resume=DIR of its run tries again"
        )

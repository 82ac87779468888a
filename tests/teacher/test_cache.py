"""The teacher cache: the live teacher's losses, one teacher pass for all, whole after a kill, bound to its teacher."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.losses import Terms
from iskd.losses.ce import CrossEntropy
from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.losses.kl_sum import FinalState
from iskd.models import Stack, surgery
from iskd.plan import Record, Remove
from iskd.schedules.edits import ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.teacher import cache, row_store
from iskd.teacher.cache import TeacherCache
from iskd.teacher.cache_rows import RowFormat, TeacherCacheSpec, check_terms_cached
from iskd.training import run
from iskd.training.step import DistillModule, OptimSpec
from tests.factories import VOCAB, tiny, windows
from tests.runs import BOTTLENECK, TOKENS, Crash, make_parts, write_text

TEXTS = windows(10).numpy().astype(np.uint16)
CHUNK = 48  # tokens: three windows in a chunk, the last chunk has one
HIDDEN, TOP = TeacherCacheSpec(chunk_tokens=CHUNK), TeacherCacheSpec("topk", top_k=5, chunk_tokens=CHUNK)
SPECS = pytest.mark.parametrize("spec", [HIDDEN, TOP], ids=["hidden", "topk"])


def teacher(seed: int = 0, **config: Any) -> PreTrainedModel:
    return tiny("llama", layers=2, seed=seed, **config)


class Passes:
    """Counts the windows that teachers were asked about; breaks off in the n-th batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows, self.left = 0, 10**9
        encode = RowFormat.encode

        def counted(format_: RowFormat, stack: Stack, input_ids: Tensor) -> Any:
            self.left -= 1
            if not self.left:
                raise Crash
            self.windows += len(input_ids)
            return encode(format_, stack, input_ids)

        monkeypatch.setattr(RowFormat, "encode", counted)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def rows(cache: TeacherCache) -> dict[str, Tensor]:
    return cache.read(range(cache.count))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def files(cache: TeacherCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


@SPECS
def test_rows_are_what_the_teacher_says(spec: TeacherCacheSpec, tmp_path: Path) -> None:
    model = teacher()
    cache = TeacherCache.open(model, TEXTS, tmp_path, spec).fill(batch_size=2)
    asked = [7, 0, 7, 9]
    found = cache.read(asked)
    with torch.no_grad():
        last = Stack(model).last_hidden(windows(10)[asked])
    if spec.kind == "hidden":
        torch.testing.assert_close(found["last_hidden"].float(), last, rtol=2**-10, atol=1e-6)
    else:
        top, ids = torch.nn.functional.linear(last, *Stack(model).head).log_softmax(-1).topk(5)
        assert torch.equal(found["ids"], ids)
        torch.testing.assert_close(found["log_probs"][..., :5], top, rtol=2**-10, atol=1e-6)
        torch.testing.assert_close(found["log_probs"].exp().sum(-1), torch.ones(4, 16), rtol=1e-3, atol=0)
    assert cache.nbytes_per_token == {"hidden": 2 * 48, "topk": 5 * 4 + 4}[spec.kind]
    sizes = [path.stat().st_size for path in cache.folder.glob("*.rows")]
    assert sum(sizes) == cache.nbytes + 32 * 10
    assert files(cache) == ["00000.rows", "00001.rows", "00002.rows", "00003.rows", "meta.json"]
    with pytest.raises(ValueError, match=r"has windows 0..9, and no 10"):
        cache.read([10])


def loss_and_gradients(terms: Terms, model: PreTrainedModel, cache: TeacherCache | None) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a step on windows 4 and 1."""
    student = copy.deepcopy(model)
    record = surgery.apply(student, Record(2), [Remove(1)])
    module = DistillModule(student, copy.deepcopy(model), terms, OptimSpec(), record, teacher_cache=cache)
    loss = module.step(windows(10)[[4, 1]], *([] if cache is None else [cache.read([4, 1])])).loss
    loss.backward()
    return loss.detach(), [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_losses_on_hidden_states_are_the_live_teachers(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """Relative to the loss, and to the length of the gradient; both are 2^-11 or 2^-8 per number."""
    terms: Terms = {"kl": (KL(temperature=2), 1.0), "ce": (CrossEntropy(), 0.1), "end": (FinalState(), 1.0)}
    model = teacher()
    spec = TeacherCacheSpec(dtype=dtype, chunk_tokens=CHUNK)
    cache = TeacherCache.open(model, TEXTS, tmp_path, spec).fill()
    (loss, grads), (live, live_grads) = loss_and_gradients(terms, model, cache), loss_and_gradients(terms, model, None)
    assert abs(loss - live) <= tolerance * live
    for ours, reference in zip(grads, live_grads, strict=True):
        assert (ours - reference).norm() <= tolerance * reference.norm()


@SPECS
def test_what_is_not_finite_is_never_kept(spec: TeacherCacheSpec, tmp_path: Path) -> None:
    model = teacher()
    with torch.no_grad():
        next(Stack(model).layers[-1].parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        TeacherCache.open(model, TEXTS, tmp_path, spec).fill()


def test_losses_on_the_likeliest_tokens_lie_below_the_live_teachers(tmp_path: Path) -> None:
    terms, model = {"kl": (KL(), 1.0), "ce": (CrossEntropy(), 0.1)}, teacher()
    live, live_grads = loss_and_gradients(terms, model, None)
    found = []
    for k in (4, 32, VOCAB - 1):
        cache = TeacherCache.open(model, TEXTS, tmp_path, TeacherCacheSpec("topk", top_k=k)).fill()
        found.append(loss_and_gradients(terms, model, cache))
    losses = [float(loss) for loss, _ in found]
    assert losses[0] < losses[1] < losses[2]
    # nothing is merged with K = V - 1: what differs is fp16
    assert losses[2] == pytest.approx(float(live), rel=2e-3)
    for ours, reference in zip(found[2][1], live_grads, strict=True):
        assert (ours - reference).norm() <= 5e-3 * reference.norm()


@SPECS
def test_steps_under_autocast_are_close_to_the_live_teachers(spec: TeacherCacheSpec, tmp_path: Path) -> None:
    model = teacher()
    with torch.autocast("cpu", torch.bfloat16):
        cache = TeacherCache.open(model, TEXTS, tmp_path, spec).fill()
        (loss, grads), (live, live_grads) = (loss_and_gradients({"kl": (KL(), 1.0)}, model, c) for c in (cache, None))
    assert 0 < loss <= 1.01 * live
    if spec.kind == "hidden":
        assert loss == pytest.approx(float(live), rel=1e-2)
        assert all((a - b).norm() <= 2e-2 * b.norm() for a, b in zip(grads, live_grads, strict=True))


@SPECS
def test_a_sweep_pays_for_one_teacher_pass(spec: TeacherCacheSpec, passes: Passes, tmp_path: Path) -> None:
    first = TeacherCache.open(teacher(), TEXTS, tmp_path, spec).fill()
    assert passes.windows == 10
    for _ in range(2):
        again = TeacherCache.open(teacher(), TEXTS.astype(np.int64), tmp_path, spec).fill()
        assert equal(rows(again), rows(first))
    assert equal(rows(TeacherCache.open(teacher(), TEXTS, tmp_path, spec)), rows(first))
    assert passes.windows == 10


@SPECS
def test_a_killed_build_goes_on_where_it_was(spec: TeacherCacheSpec, passes: Passes, tmp_path: Path) -> None:
    whole = TeacherCache.open(teacher(), TEXTS, tmp_path / "whole", spec).fill(batch_size=1)
    passes.windows, passes.left = 0, 6
    with pytest.raises(Crash):
        TeacherCache.open(teacher(), TEXTS, tmp_path / "killed", spec).fill(batch_size=1)
    assert passes.windows == 5
    cache = TeacherCache.open(teacher(), TEXTS, tmp_path / "killed", spec).fill(batch_size=1)
    assert passes.windows == 10
    assert files(cache) == files(whole)
    assert all((cache.folder / name).read_bytes() == (whole.folder / name).read_bytes() for name in files(whole))


@SPECS
def test_only_the_windows_that_are_read_are_paid_for(spec: TeacherCacheSpec, passes: Passes, tmp_path: Path) -> None:
    whole = rows(TeacherCache.open(teacher(), TEXTS, tmp_path / "whole", spec).fill(batch_size=1))
    passes.windows = 0
    for asked, paid in ([7, 2], 2), ([2, 7, 2], 2), ([8, 2], 3):
        cache = TeacherCache.open(teacher(), TEXTS, tmp_path / "lazy", spec)
        for _ in range(2):
            found = cache.read(asked)
            for name, values in found.items():
                torch.testing.assert_close(values, whole[name][asked], rtol=2**-10, atol=1e-6)
        assert passes.windows == paid
        assert equal(TeacherCache.open(teacher(), TEXTS, tmp_path / "lazy", spec).read(asked), found)
    assert files(cache) == ["00000.rows", "00002.rows", "meta.json"]
    written = [path.stat().st_blocks for path in cache.folder.glob("*.rows")]
    assert sum(written) * 512 <= cache.nbytes + 32 * 10 + 2 * 8192
    assert equal(rows(TeacherCache.open(teacher(), TEXTS, tmp_path / "lazy", spec).fill()), rows(cache))
    assert passes.windows == 10


def test_the_precision_is_that_in_which_the_cache_was_opened(tmp_path: Path) -> None:
    model = teacher()
    with torch.autocast("cpu", torch.bfloat16):
        ahead = TeacherCache.open(model, TEXTS, tmp_path / "ahead", HIDDEN).fill()
        lazy = TeacherCache.open(model, TEXTS, tmp_path / "lazy", HIDDEN)
    plain = TeacherCache.open(model, TEXTS, tmp_path / "plain", HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        assert not equal(plain.read([3]), ahead.read([3]))
    torch.testing.assert_close(lazy.read([3]), ahead.read([3]), rtol=2**-7, atol=1e-6)
    assert not equal(plain.read([3]), lazy.read([3]))
    assert equal(plain.read([3]), TeacherCache.open(model, TEXTS, tmp_path / "again", HIDDEN).read([3]))


def test_a_digest_is_computed_once_per_window_and_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    TeacherCache.open(teacher(), TEXTS, tmp_path, HIDDEN).fill()
    cache = TeacherCache.open(teacher(), TEXTS, tmp_path, HIDDEN)
    sizes: list[int] = []
    sha256 = row_store.hashlib.sha256
    monkeypatch.setattr(row_store.hashlib, "sha256", lambda data: sizes.append(len(data)) or sha256(data))
    for _ in range(3):
        cache.read([4, 9, 4])
    assert sizes == 2 * [16 * 2 * 48], "each window once, and of no other one a byte"


def test_torn_and_changed_windows_are_asked_again(passes: Passes, tmp_path: Path) -> None:
    cache = TeacherCache.open(teacher(), TEXTS, tmp_path, HIDDEN).fill(batch_size=1)
    expected, (first, second, third, fourth) = rows(cache), sorted(cache.folder.glob("*.rows"))
    first.write_bytes(first.read_bytes()[:-5])  # the digest of window 2
    second.unlink()
    content = bytearray(third.read_bytes())
    content[100] ^= 1  # window 6
    third.write_bytes(content)
    passes.windows = 0
    again = TeacherCache.open(teacher(), TEXTS, tmp_path, HIDDEN)
    for window in range(10):
        assert equal(again.read([window]), {"last_hidden": expected["last_hidden"][[window]]})
    assert passes.windows == 1 + 3 + 1
    assert equal(rows(TeacherCache.open(teacher(), TEXTS, tmp_path, HIDDEN)), expected)
    assert passes.windows == 5
    second.unlink()
    fourth.write_bytes(b"")
    passes.windows = 0
    TeacherCache.open(teacher(), TEXTS, tmp_path, HIDDEN).fill()
    assert passes.windows == 4
    assert equal(again.read([4, 9]), {"last_hidden": expected["last_hidden"][[4, 9]]})


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    cache = TeacherCache.open(teacher(), TEXTS, tmp_path / "cache", HIDDEN)
    target = tmp_path / "of somebody else"
    target.write_bytes(b"theirs")
    (cache.folder / "00000.rows").symlink_to(target)
    with pytest.raises(OSError, match=r"00000\.rows"):
        cache.read([0])
    assert target.read_bytes() == b"theirs"


def test_a_full_disk_stops_the_writing_and_not_the_run(
    passes: Passes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    expected = TeacherCache.open(teacher(), TEXTS, tmp_path / "whole", HIDDEN).fill().read([3])
    cache = TeacherCache.open(teacher(), TEXTS, tmp_path / "full", HIDDEN)
    monkeypatch.setattr(row_store.RowStore, "put", full)
    passes.windows = 0
    with caplog.at_level("WARNING"):
        caplog.clear()
        for _ in range(3):
            torch.testing.assert_close(cache.read([3]), expected, rtol=2**-10, atol=1e-6)
    assert passes.windows == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot write ([Errno 28] No space left on device)" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        TeacherCache.open(teacher(), TEXTS, tmp_path / "full", HIDDEN).fill()


def test_processes_that_read_the_same_windows_do_not_wait_for_each_other(tmp_path: Path) -> None:
    model, found = teacher(), []

    def read() -> None:
        cache = TeacherCache.open(model, TEXTS, tmp_path, HIDDEN)
        found.append([cache.read([window])["last_hidden"] for window in (5, 1, 8)])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = TeacherCache.open(model, TEXTS, tmp_path, HIDDEN)
    reference = [again.read([window])["last_hidden"] for window in (5, 1, 8)]
    assert len(found) == 4
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, reference, strict=True))


def test_a_cache_belongs_to_one_teacher_one_text_and_one_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = TEXTS.copy()
    other[3, 2] += 1
    touched = teacher()
    with torch.no_grad():
        next(touched.parameters())[5, 5] += 1e-3
    folders = {
        TeacherCache(model, texts, tmp_path, spec, tokenizer).folder
        for model, texts, spec, tokenizer in [
            (teacher(), TEXTS, HIDDEN, "a"),
            (teacher(), TEXTS, HIDDEN, "b"),
            (teacher(), other, HIDDEN, "a"),
            (teacher(), TEXTS[:9], HIDDEN, "a"),
            (teacher(), TEXTS.reshape(20, 8), HIDDEN, "a"),
            (teacher(seed=1), TEXTS, HIDDEN, "a"),
            (touched, TEXTS, HIDDEN, "a"),
            (teacher(rms_norm_eps=1e-3), TEXTS, HIDDEN, "a"),
            (teacher(), TEXTS, TeacherCacheSpec(dtype="bfloat16", chunk_tokens=CHUNK), "a"),
            (teacher(), TEXTS, TOP, "a"),
            (teacher(), TEXTS, TeacherCacheSpec("topk", top_k=6, chunk_tokens=CHUNK), "a"),
        ]
    }
    assert len(folders) == 11
    eager = teacher()
    eager.config._attn_implementation = "eager"
    assert TeacherCache(eager, TEXTS, tmp_path, HIDDEN, "a").folder not in folders
    with torch.autocast("cpu", torch.bfloat16):
        assert TeacherCache(teacher(), TEXTS, tmp_path, HIDDEN, "a").folder not in folders
    for library in (cache.torch, cache.transformers):
        with monkeypatch.context() as patched:
            patched.setattr(library, "__version__", "9.9.9")
            assert TeacherCache(teacher(), TEXTS, tmp_path, HIDDEN, "a").folder not in folders
    recipe = TeacherCache(teacher(), TEXTS, tmp_path, HIDDEN, "a").recipe
    assert {recipe[key] for key in ("attention", "device", "autocast")} == {"sdpa", "cpu", "None"}
    assert TeacherCache(teacher(), TEXTS, tmp_path, HIDDEN, "a").folder in folders


def test_a_folder_that_holds_another_cache_is_refused(tmp_path: Path) -> None:
    cache = TeacherCache.open(teacher(), TEXTS, tmp_path, HIDDEN).fill()
    other = TeacherCache.open(teacher(seed=1), TEXTS, tmp_path, HIDDEN).fill()
    meta = cache.folder / "meta.json"
    meta.write_bytes((other.folder / "meta.json").read_bytes())
    with pytest.raises(ValueError, match="describes another teacher cache: delete the folder"):
        TeacherCache.open(teacher(), TEXTS, tmp_path, HIDDEN)
    meta.write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        TeacherCache.open(teacher(), TEXTS, tmp_path, HIDDEN).fill()


def test_one_process_builds_and_others_find_the_result(
    passes: Passes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[TeacherCache] = []
    model, replace, all_wrote = teacher(), os.replace, threading.Barrier(3)

    def together(draft: Path, path: Path) -> None:
        all_wrote.wait(timeout=60)
        replace(draft, path)

    monkeypatch.setattr(os, "replace", together)
    threads = [
        threading.Thread(target=lambda: found.append(TeacherCache.open(model, TEXTS, tmp_path, HIDDEN).fill()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert passes.windows == 10
    assert equal(rows(found[0]), rows(found[2]))


def test_a_run_in_bf16_keeps_what_its_own_teacher_says(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    for precision, expected in (("bf16-mixed", "torch.bfloat16"), ("32-true", "None")):
        folder = tmp_path / precision
        schedule = Iterative(ReplaceWith(BOTTLENECK), layers=[2], tokens=4 * TOKENS)
        made = make_parts(folder, text, folder / "shards", schedule=schedule, trainer={"precision": precision})
        run(replace(made, teacher_cache=TeacherCacheSpec(), terms={"kl": (KL(), 1.0)}))
        (meta,) = folder.glob("teacher/*/meta.json")
        assert json.loads(meta.read_text())["autocast"] == expected


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loud = teacher()
    with torch.no_grad():
        Stack(loud).base.get_submodule("norm").get_parameter("weight").mul_(1e6)
    with pytest.raises(ValueError, match=r"not finite in float16: use teacher\.dtype=bfloat16"):
        TeacherCache.open(loud, TEXTS, tmp_path, HIDDEN).fill()
    TeacherCache.open(loud, TEXTS, tmp_path, TeacherCacheSpec(dtype="bfloat16")).fill()
    with pytest.raises(ValueError, match=rf"teacher\.top_k={VOCAB} leaves no rest of {VOCAB} tokens"):
        TeacherCache.open(teacher(), TEXTS, tmp_path, TeacherCacheSpec("topk", top_k=VOCAB)).fill()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 100))
    with pytest.raises(ValueError, match=r"teacher\.cache=topk needs .* GB in .* are free; set data\.max_train_tokens"):
        TeacherCache.open(teacher(), TEXTS, tmp_path, TOP).fill()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "logits"}, r"teacher\.cache='logits': choose hidden or topk"),
        ({"dtype": "float32"}, r"teacher\.dtype='float32': choose float16 or bfloat16"),
        ({"top_k": 0}, r"teacher\.top_k must be at least 1"),
        ({"chunk_tokens": 0}, r"teacher\.chunk_tokens must be at least 1"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherCacheSpec(**values)


class Agreement:
    """A loss on logits that knows nothing of buckets."""

    needs = frozenset({"logits"})


@pytest.mark.parametrize(
    ("kind", "loss", "message"),
    [
        ("hidden", HiddenMatch(), r"loss\.x compares what happens inside the teacher \(hidden\).*teacher\.cache=null"),
        ("topk", HiddenMatch(), r"loss\.x compares what happens inside the teacher \(hidden\)"),
        ("topk", FinalState(), r"loss\.x reads the teacher's last hidden state.*set teacher\.cache=hidden"),
        ("topk", KL(temperature=2), r"loss\.x\.temperature=2 softens .* loss\.x\.temperature=1"),
        ("topk", Agreement(), r"loss\.x \(Agreement\) does not say by_buckets=True"),
    ],
)
def test_losses_that_need_more_than_the_cache_holds_are_refused(kind: str, loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_terms_cached({"ce": (CrossEntropy(), 1.0), "x": (loss, 0.5)}, kind)
    check_terms_cached({"ce": (CrossEntropy(), 1.0), "x": (loss, 0.0)}, kind)


def test_the_module_refuses_a_cache_that_its_losses_cannot_use(tmp_path: Path) -> None:
    model = teacher()
    cache = TeacherCache.open(model, TEXTS, tmp_path, HIDDEN).fill()
    with pytest.raises(ValueError, match=r"loss\.hidden compares"):
        DistillModule(
            copy.deepcopy(model), model, {"hidden": (HiddenMatch(), 1.0)}, OptimSpec(), Record(2), teacher_cache=cache
        )

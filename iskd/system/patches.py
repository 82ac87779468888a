"""Patches of foreign libraries: what the package puts in the place of other libraries' functions, in this file alone.

Why each cannot be an argument stands at its function; CONTRIBUTING.md lists them with the versions they were tried on.
Each acts on what its caller names; `one_text` also stands before a function of the process, which answers as before
outside its context. Where the library has lost the name, one that saves time does nothing, and one that refuses what
would be wrong raises AttributeError.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from transformers import masking_utils

_LOOK, _OURS = "find_packed_sequence_indices", "iskd_wrapper"
_one_text: ContextVar[bool] = ContextVar("one_text", default=False)  # every thread begins with the default
_installing = threading.Lock()


@contextmanager
def one_text() -> Iterator[None]:
    """Inside the context, in this thread, transformers takes every window for one text without a look at it.

    In every pass it asks whether positions restart somewhere, and a device has to be waited for the answer; to be used
    where it is known that they do not. No argument of a model says so: positions are always asked, a mask of two
    dimensions is looked at too, and one of four keeps sdpa from its causal kernel.
    """
    _install()
    before = _one_text.set(True)
    try:
        yield
    finally:
        _one_text.reset(before)


def _install() -> None:
    """Stand before transformers' question, once and for good: what one thread knows another must not believe."""
    with _installing:
        look = getattr(masking_utils, _LOOK, None)
        if look is None or hasattr(look, _OURS):
            return

        @wraps(look)
        def asked(*args: Any, **kwargs: Any) -> Any:
            return None if _one_text.get() else look(*args, **kwargs)

        setattr(asked, _OURS, True)
        setattr(masking_utils, _LOOK, asked)


def without_sigterm_broadcast(trainer: Any) -> None:
    """Keep a Lightning trainer from asking rank 0 for a SIGTERM before every micro-batch, which waits for the device.

    The ranks agree on a stop in `iskd.training.step.guard`. Lightning has no switch for its question; only the loop of
    this trainer is changed.
    """
    vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None


def without_signal_handlers(trainer: Any) -> None:
    """Keep a Lightning trainer from handlers of its own for stop signals.

    They would stand in the place of `iskd.system.stop_signals` from the sanity check on: one does collectives inside a
    signal handler, and what it noted ends a fit after the next micro-batch with exit code 0 and nothing saved.
    Lightning has no switch for them.
    """
    connector = trainer._signal_connector
    if not callable(connector.register_signal_handlers):
        raise AttributeError("register_signal_handlers")
    vars(connector)["register_signal_handlers"] = lambda: None


def before_joining(strategy: Any, name: str, meet: Callable[[Callable[[], None]], None]) -> None:
    """Have the processes of a Lightning strategy `meet` before its method `name` makes their process group.

    It waits for all of them for half an hour, and has no hook before it; only this strategy is changed. `meet` is given
    the method, to call.
    """
    join = getattr(strategy, name)
    vars(strategy)[name] = lambda: meet(join)


def before_scoring(adapter: Any, look: Callable[[Sequence[Any]], None]) -> None:
    """Show `look` the requests that an adapter of lm-eval is to score, before it cuts them to its context in silence.

    Requests are (texts, ids of the context, ids of the continuation); lm-eval has no hook between tokens and scores.
    """
    score = adapter._loglikelihood_tokens

    def shown(requests: Sequence[Any], **options: Any) -> Any:
        look(requests)
        return score(requests, **options)

    adapter._loglikelihood_tokens = shown


def before_writing(adapter: Any, fit: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
    """Let `fit` answer with the requests that an adapter of lm-eval is to generate for, in the place of those it gets.

    It cuts prompts in silence, and ends with an AssertionError where an answer may be as long as the context.
    """
    write = adapter.generate_until
    adapter.generate_until = lambda requests, *args, **options: write(fit(requests), *args, **options)


def before_examples(task: Any, choose: Callable[[Any, list[Any], int], list[Any]]) -> None:
    """Let `choose` answer with the examples that a task of lm-eval shows, given the question, those drawn and how many.

    Its sampler is not told the question where examples are of another split; lm-eval has no argument for it.
    """
    context, draw, asked = task.fewshot_context, task.sampler.sample, list[Any]()

    def shown(question: Any, *args: Any, **options: Any) -> Any:
        asked[:] = [question]
        return context(question, *args, **options)

    def drawn(n: int, *args: Any, **options: Any) -> Any:
        found = draw(n, *args, **options)
        return choose(asked[0], list(found), n) if asked and n else found

    task.fewshot_context, task.sampler.sample = shown, drawn


@contextmanager
def nothing_fetched() -> Iterator[None]:
    """Inside, the hub's libraries answer from this machine alone; what is not there is missing.

    A plan needs no weights, text or tasks: it is measured with those that are at hand, and goes by sizes otherwise. The
    libraries read the variables when they are imported, which may have been long ago.
    """
    from huggingface_hub import constants

    names, before = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), constants.HF_HUB_OFFLINE
    kept = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))  # of libraries that are yet to be imported, and of other processes
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        for name, value in kept.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = before

"""Several sources as one, by shares of tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from iskd.data.sources import Source
from iskd.data.splits import Document

_NAME = re.compile(r"[A-Za-z_][\w-]{0,63}")
# keys that errors of a source name, as they are of one source alone
_KEYS = re.compile(
    r"\bdata\.(?:source\.)?(path|val_path|test_path|fmt|field|detokenize|name|config|split|val_split|test_split|revision"
    r"|max_documents|streaming|lines|min_chars)\b"
)
CYCLE = 10_000
"""Windows after which the order of sources begins anew; shares are exact to one in so many."""


@dataclass(frozen=True)
class Mix:
    """Several sources, each with its share of the training tokens: `data=mix`.

    A weight is a share of tokens, not of documents, and weights need not add up to 1. Every window of training is of
    one source, and after any number of windows each source has had its share of them to within a window or two.
    Validation and calibration text have the same shares. The tokens on the disk do not depend on the weights, so that
    another mix of the same sources starts at once.

    Args:
        sources: source and weight by name.
        exhausted: what happens when a source has fewer tokens than its share of the run: `repeat` begins it again, in
            a new order; `stop` refuses the run before its first step.
    """

    takes = ("sources",)

    sources: Mapping[str, tuple[Source, float]]
    exhausted: Literal["repeat", "stop"] = "repeat"

    def __post_init__(self) -> None:
        """Check names, weights and kinds.

        Raises:
            ValueError: there is no source, a weight is no share, or a share is less than one window in `CYCLE`.
        """
        if not self.sources:
            raise ValueError(
                "data=mix has no sources: set data.sources.NAME.path=FILE (or .name=OWNER/NAME, or .data=PRESET) and "
                "data.sources.NAME.weight=SHARE for each"
            )
        if self.exhausted not in ("repeat", "stop"):
            raise ValueError(f"data.source.exhausted={self.exhausted!r} is unknown; use repeat or stop")
        for name, (_, weight) in self.sources.items():
            if _NAME.fullmatch(name) is None:
                raise ValueError(
                    f"data.sources.{name}: the name of a source is a word of letters, digits, _ and -; rename it"
                )
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"data.sources.{name}.weight={weight:g} is no share of the tokens: give a number above 0, or leave "
                    "the source out"
                )
        for name, share in self.shares.items():
            if round(share * CYCLE) < 1:
                raise ValueError(
                    f"data.sources.{name}.weight is {share:.2g} of all, less than one window in {CYCLE:,}: raise it, "
                    "or leave the source out"
                )

    @property
    def shares(self) -> dict[str, float]:
        """Weights that add up to 1, by name."""
        most = max(weight for _, weight in self.sources.values())  # the sum of huge ones is infinite
        scaled = {name: weight / most for name, (_, weight) in self.sources.items()}
        total = math.fsum(scaled.values())
        return {name: weight / total for name, weight in scaled.items()}

    def documents(self) -> Iterator[Document]:
        """Yield the documents of all sources one after the other, those with a split first."""
        opened = [parted(source.documents()) for source, _ in self.sources.values()]
        return chain(*(placed for placed, _ in opened), *(others for _, others in opened))

    def fingerprint(self) -> str:
        """Join those of the sources."""
        found = []
        for name, (source, _) in self.sources.items():
            try:
                found.append(f"{name}:{source.fingerprint()}")
            except ValueError as error:
                raise named(error, name) from error
        return ";".join(found)

    def __repr__(self) -> str:
        """Name the sources; without weights, as the tokens on the disk do not depend on them."""
        return f"Mix({', '.join(f'{name}={source!r}' for name, (source, _) in self.sources.items())})"


def sources_of(source: Source) -> dict[str, Source]:
    """The sources of a mix by name; of another source itself, under the empty name."""
    return {name: each for name, (each, _) in source.sources.items()} if isinstance(source, Mix) else {"": source}


def mapped(source: Source, change: Callable[[Source], Source]) -> Source:
    """`change(source)`, of a mix for each of its sources. Raises ValueError as it does, with the name of the source."""
    if not isinstance(source, Mix):
        return change(source)
    changed: dict[str, tuple[Source, float]] = {}
    for name, (each, weight) in source.sources.items():
        try:
            changed[name] = (change(each), weight)
        except ValueError as error:
            raise named(error, name) from error
    return replace(source, sources=changed)


def parted(documents: Iterable[Document]) -> tuple[Iterator[Document], Iterator[Document]]:
    """The documents that are placed in a split, which come first, and the others; read in this order, and once."""
    rest, found = iter(documents), list[Document]()

    def placed() -> Iterator[Document]:
        for document in rest:
            if document[1] is None:
                found.append(document)
                return
            yield document

    def others() -> Iterator[Document]:
        yield from found
        yield from rest

    return placed(), others()


def named(error: ValueError, name: str) -> ValueError:
    """An error of one source, with its name in a mix: the keys that it speaks of are those of that source."""
    if not name:
        return error
    said = _KEYS.sub(rf"data.sources.{name}.\1", str(error))
    return ValueError(said if f"data.sources.{name}" in said else f"data.sources.{name}: {said}")

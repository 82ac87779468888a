"""Train, validation and test: the rule that gives every document one split.

A document without a split of its own is placed by the SHA-256 of its text, so the same text is always in the same
split, whatever the order, the machine or the run. Documents with a split of their own come first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

SPLITS = ("train", "validation", "calibration", "test")
Document = tuple[str, str | None]
PlacedTexts = dict[bytes, str]
"""The split of each text that a source has placed itself, by the SHA-256 of the text."""


@dataclass
class Splitter:
    """Gives every document one split; no text is ever in two.

    A document's place is the first 64 bits of the SHA-256 of its text, read as a fraction of 2**64: [0, calibration)
    is calibration, the next share validation, the next test, the rest train. A split that the source provides itself
    takes no share, and a text that the source placed explicitly is dropped from wherever it appears later.

    Args:
        validation: share of validation in [0, 1).
        calibration: share of calibration.
        test: share of test.
    """

    validation: float = 0.04
    calibration: float = 0.04
    test: float = 0.0
    dropped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check that the shares leave something to train on."""
        shares = {name: float(getattr(self, name)) for name in SPLITS[1:]}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ValueError(f"data.{name}_fraction={share} is not a share; use a number in [0, 1)")
        if sum(shares.values()) >= 1:
            raise ValueError(f"the held-out shares {shares} leave nothing to train on; lower data.*_fraction")

    def assign(
        self, documents: Iterable[Document], placed: PlacedTexts | None = None, provided: set[str] | None = None
    ) -> Iterator[tuple[str, str]]:
        """Yield (text, split) for the documents that are kept; `dropped` counts the others.

        Args:
            documents: of one source.
            placed: grows by the texts that documents place themselves; what is in it is in no other split.
            provided: grows by the splits that they are placed in; the source gives no other documents to them.

        Raises:
            ValueError: a split is unknown, or a document with a split follows one without.
        """
        placed, provided = {} if placed is None else placed, set() if provided is None else provided
        bands: list[tuple[float, str]] | None = None
        for text, split in documents:
            digest = _digest(text)
            if split is None:
                if bands is None:
                    bands = self._bands(provided)
                place, keep = self._place(digest, bands), digest not in placed
            elif split not in SPLITS:
                raise ValueError(f"a document has split {split!r}; use one of {', '.join(SPLITS)} or None")
            elif bands is not None:
                raise ValueError(f"a source yielded split {split!r} after a document without one; yield it first")
            else:
                place, keep = split, placed.setdefault(digest, split) == split
                if keep:
                    provided.add(split)
            if keep:
                yield text, place
            else:
                self.dropped += 1

    def _bands(self, provided: set[str]) -> list[tuple[float, str]]:
        """Return (upper edge, split) in order; what the source provides itself has no band."""
        bands, edge = [], 0.0
        for name in ("calibration", "validation", "test"):
            if name not in provided:
                edge += getattr(self, name)
                bands.append((edge, name))
        return bands

    @staticmethod
    def _place(digest: bytes, bands: list[tuple[float, str]]) -> str:
        position = int.from_bytes(digest[:8], "big") / 2**64
        return next((name for edge, name in bands if position < edge), "train")


def _digest(text: str) -> bytes:
    return hashlib.sha256(_encode(text)).digest()


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        excerpt = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(f"a document holds half a character ({excerpt!r}); remove it or repair the escape") from error

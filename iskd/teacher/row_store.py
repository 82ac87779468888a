"""Records of equal size on disk, found by number, that may be there or not.

    00000.rows   the records of `per_file` numbers one after the other, then the SHA-256 of each

A file has its full length from the start and takes disk only where somebody wrote (it is sparse). A record is there
when its digest is that of its bytes, so that nothing has to be locked, renamed or cleaned up: what a killed process, a
full disk or two writers of the same number leave half-written is not there, and is written again. A digest is computed
once per record and process, when it is first read.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

_DIGEST = 32  # bytes
_ABSENT = bytes(_DIGEST)


class RowStore:
    """The records of one folder.

    Args:
        folder: where the files are; it exists before the first `put`.
        count: numbers are 0 .. count - 1.
        size: bytes of a record.
        per_file: numbers per file.
    """

    def __init__(self, folder: Path, count: int, size: int, per_file: int) -> None:
        self.folder, self.count, self.size, self.per_file = folder, count, size, per_file
        self._sound = bytearray(count)  # 1 = the digest was found right in this process

    def get(self, number: int) -> bytes | None:
        """A record, or None when it is not there or not what was written."""
        path, record_at, digest_at = self._place(number)
        with suppress(FileNotFoundError), open(path, "rb", opener=_no_link) as file:
            file.seek(record_at)
            record = file.read(self.size)
            if len(record) == self.size and self._sound[number]:
                return record
            file.seek(digest_at)
            if file.read(_DIGEST) == hashlib.sha256(record).digest():
                self._sound[number] = 1
                return record
        return None

    def put(self, number: int, record: bytes) -> None:
        """Write a record; raises OSError, e.g. when the disk is full."""
        path, record_at, digest_at = self._place(number)
        end = digest_at - number % self.per_file * _DIGEST + self._in_file(number) * _DIGEST
        self._sound[number] = 0
        with open(path, "r+b", opener=_made) as file:
            if file.seek(0, os.SEEK_END) < end:
                file.truncate(end)
            file.seek(record_at)
            file.write(record)
            file.seek(digest_at)
            file.write(hashlib.sha256(record).digest())

    def missing(self) -> list[int]:
        """Numbers that were never written, by their digests alone: `get` finds those that changed since."""
        found: list[int] = []
        for first in range(0, self.count, self.per_file):
            path, _, digest_at = self._place(first)
            digests = b""
            with suppress(FileNotFoundError), open(path, "rb", opener=_no_link) as file:
                file.seek(digest_at)
                digests = file.read(self._in_file(first) * _DIGEST)
            pieces = (digests[at : at + _DIGEST] for at in range(0, self._in_file(first) * _DIGEST, _DIGEST))
            found += [first + n for n, piece in enumerate(pieces) if len(piece) < _DIGEST or piece == _ABSENT]
        return found

    def _in_file(self, number: int) -> int:
        """How many records the file of a number holds."""
        return min(self.per_file, self.count - number // self.per_file * self.per_file)

    def _place(self, number: int) -> tuple[Path, int, int]:
        """The file of a number, and where its record and its digest begin."""
        file, row = divmod(number, self.per_file)
        return self.folder / f"{file:05d}.rows", row * self.size, self._in_file(number) * self.size + row * _DIGEST


def _no_link(path: str, flags: int) -> int:
    """Open without following a link: the folder may be one that others can write to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _made(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)

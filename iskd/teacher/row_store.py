"""A sparse file store of rows of equal size: each found by its number, there or not, checked by its digest.

    00000.rows   the rows of `per_file` numbers one after the other, then the SHA-256 of each

A file has its full length from the start and takes disk only where somebody wrote (it is sparse). A row is there
when its digest is that of its bytes, so that nothing has to be locked, renamed or cleaned up: what a killed process, a
full disk or two writers of the same number leave half-written is not there, and is written again. A digest is computed
once per row and process, when it is first read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

_DIGEST = 32  # bytes
_ABSENT = bytes(_DIGEST)


class RowStore:
    """The rows of one folder.

    Args:
        folder: where the files are; it exists before the first `put`.
        count: numbers are 0 .. count - 1.
        size: bytes of a row.
        per_file: numbers per file.
    """

    def __init__(self, folder: Path, count: int, size: int, per_file: int) -> None:
        self.folder, self.count, self.size, self.per_file = folder, count, size, per_file
        self._sound = bytearray(count)  # 1 = the digest was found right in this process

    def get(self, number: int) -> bytes | None:
        """A row, or None when it is not there or not what was written."""
        path, row_at, digest_at = self._place(number)
        with suppress(FileNotFoundError, NotADirectoryError), open(path, "rb", opener=_no_link) as file:
            file.seek(row_at)
            row = file.read(self.size)
            if len(row) == self.size and self._sound[number]:
                return row
            file.seek(digest_at)
            if file.read(_DIGEST) == hashlib.sha256(row).digest():
                self._sound[number] = 1
                return row
        return None

    def put(self, number: int, row: bytes) -> None:
        """Write a row; raises OSError, e.g. when the disk is full."""
        path, row_at, digest_at = self._place(number)
        end = digest_at - number % self.per_file * _DIGEST + self._in_file(number) * _DIGEST
        self._sound[number] = 0
        with open(path, "r+b", opener=_made) as file:
            if file.seek(0, os.SEEK_END) < end:
                file.truncate(end)
            file.seek(row_at)
            file.write(row)
            file.seek(digest_at)
            file.write(hashlib.sha256(row).digest())

    def missing(self) -> list[int]:
        """Numbers that were never written, by their digests alone: `get` finds those that changed since."""
        found: list[int] = []
        for first in range(0, self.count, self.per_file):
            path, _, digest_at = self._place(first)
            digests = b""
            with suppress(FileNotFoundError, NotADirectoryError), open(path, "rb", opener=_no_link) as file:
                file.seek(digest_at)
                digests = file.read(self._in_file(first) * _DIGEST)
            pieces = (digests[at : at + _DIGEST] for at in range(0, self._in_file(first) * _DIGEST, _DIGEST))
            found += [first + n for n, piece in enumerate(pieces) if len(piece) < _DIGEST or piece == _ABSENT]
        return found

    def _in_file(self, number: int) -> int:
        """How many rows the file of a number holds."""
        return min(self.per_file, self.count - number // self.per_file * self.per_file)

    def _place(self, number: int) -> tuple[Path, int, int]:
        """The file of a number, and where its row and its digest begin."""
        file, at = divmod(number, self.per_file)
        return self.folder / f"{file:05d}.rows", at * self.size, self._in_file(number) * self.size + at * _DIGEST


def _no_link(path: str, flags: int) -> int:
    """Open a plain file, without following a link and without waiting: others may be able to write to the folder."""
    opened = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "is not a plain file: delete it", path)
    return opened


def _made(path: str, flags: int) -> int:
    return _no_link(path, flags | os.O_CREAT)

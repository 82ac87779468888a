"""Bytes of a file to lines of text: unpacked by its first bytes, decoded by its byte order mark."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

_PACKED = {  # of bz2 behind the level too: a text may begin with these letters
    re.compile(rb"\x1f\x8b"): "gzip",
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): "bz2",
    re.compile(rb"\xfd7zXZ\0"): "xz",
    re.compile(rb"\x28\xb5\x2f\xfd"): "zstd",
}
_SUFFIXES = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
_OTHER_SCRIPTS = ("GB18030", "BIG5", "SHIFT_JIS", "EUC-JP", "EUC-KR", "WINDOWS-1251", "KOI8-R", "UTF-16LE", "UTF-16BE")
_MARKS = (  # longer ones first: a mark of UTF-32 begins with one of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_ISO_2022 = re.compile(rb"\x1b\$([@B]|\)C|\([CD])")
_SPELLED = {  # and how much of a text is spelled so: almost all of Chinese, a letter with an accent now and then
    "HZ": (re.compile(rb"~\{(?:[!-w][!-~])+~\}"), 0.2),
    "UTF-7": (re.compile(rb"\+[A-Za-z0-9+/]{3,}-?"), 0.02),
}
_SPELLED_LEAST = 2
# Base64 would be letters of all at once
_SCRIPTS = [
    re.compile(rf"[{own}\u2010-\u20ac -~]+")
    for own in ("\xa0-\u024f", "\u0370-\u06ff", "\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef", "\u3000-\u303f\uac00-\ud7a3")
]


def packed(suffix: str) -> bool:
    """Whether a suffix says that a file is packed, in a way that is unpacked here."""
    return suffix.lower() in _SUFFIXES


def packing_of(head: bytes) -> str | None:
    """What a file is packed by, of its first bytes."""
    return next((name for magic, name in _PACKED.items() if magic.match(head)), None)


def codec_of(head: bytes) -> str:
    """The encoding that the byte order mark at the beginning of a file names; UTF-8 without one."""
    return next((codec for mark, codec in _MARKS if head.startswith(mark)), "utf-8-sig")


def seven_bits(head: bytes) -> str | None:
    """An encoding that writes other letters by signs of ASCII, of the beginning of a file; None = it shows none.

    Formulas, Base64 and the format strings of Lisp have such signs too: it is one where enough of the text is spelled
    so, in the letters of one script.
    """
    if max(head, default=0) > 0x7F:
        return None
    if found := _ISO_2022.search(head):
        return "ISO-2022-KR" if found[0] == b"\x1b$)C" else "ISO-2022-JP"
    for name, (pattern, share) in _SPELLED.items():
        spelled = [found[0] for found in pattern.finditer(head) if found.end() < len(head)]
        if len(spelled) >= _SPELLED_LEAST and sum(map(len, spelled)) > share * len(head):
            try:
                letters = "".join(part.decode(name) for part in spelled)
            except UnicodeDecodeError:
                continue
            if not letters.isascii() and any(script.fullmatch(letters) for script in _SCRIPTS):
                return name
    return None


def first_bytes(file: Path, count: int, unpack: bool = True) -> bytes:
    """At most so many bytes at the beginning of a file, or of what is packed in it.

    Raises:
        ValueError: it cannot be unpacked.
    """
    with _opened(file, unpack) as stream:
        return stream.read(count)


def lines_of(file: Path) -> Iterator[str]:
    r"""Yield the lines of a text file, with `\n` at their ends, without a byte order mark.

    Raises:
        ValueError: it is binary, in an encoding that it does not tell, or cannot be unpacked; with the place.
    """
    codec = codec_of(first_bytes(file, 4))
    try:
        with _opened(file) as stream, io.TextIOWrapper(cast(Any, stream), encoding=codec) as lines:
            for line in lines:
                if "\0" in line:
                    raise ValueError(_fault(file, codec, "NUL"))
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(_fault(file, codec, error.reason)) from error


@contextmanager
def _opened(file: Path, unpack: bool = True) -> Iterator[IO[bytes]]:
    with file.open("rb") as raw:
        head = raw.read(10)
        raw.seek(0)
        how = packing_of(head) if unpack else None
        said = _SUFFIXES.get(file.suffix.lower()) if unpack and head else None
        if said not in (None, how):
            raise ValueError(f"{file} is not a whole {said} file, which its suffix says; rename it or fetch it again")
        if how is None:
            yield raw
            return
        try:
            with cast(IO[bytes], _unpacked(file, raw, how)) as stream:
                yield stream
        # OSError: what bz2 and pyarrow say of damage
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{file} is not a whole {how} file ({error}); fetch it again") from error


def _unpacked(file: Path, raw: IO[bytes], how: str) -> Any:
    if how == "gzip":
        return gzip.open(raw)
    if how in ("bz2", "xz"):
        return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor if how == "bz2" else lzma.LZMADecompressor))
    try:
        from pyarrow import CompressedInputStream, PythonFile
    except ImportError as error:
        fix = "pip install pyarrow (or iskd[data]), or unpack it (zstd -d FILE)"
        raise ValueError(f"{file} is packed by zstd, which needs the package pyarrow: {fix}") from error
    return io.BufferedReader(CompressedInputStream(PythonFile(raw), "zstd"))


class _Streams(io.RawIOBase):
    """What the packed streams of a file hold, one after another.

    `bz2.open` and `lzma.open` pass over anything behind the first one that is no stream, as in a file that was written
    over in part.
    """

    def __init__(self, raw: IO[bytes], make: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._raw, self._make, self._stream, self._rest = raw, make, make(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if not self._rest and (self._stream.eof or self._stream.needs_input):
                self._rest = self._raw.read(io.DEFAULT_BUFFER_SIZE)
                if not self._rest and self._stream.eof:
                    return 0
                if not self._rest:
                    raise EOFError("it ends within its packing")
            if self._stream.eof:
                self._rest = self._rest.lstrip(b"\0")  # xz fills up with zeros
                if not self._rest:
                    continue
                self._stream = self._make()
            found = self._stream.decompress(self._rest, len(buffer))
            self._rest = self._stream.unused_data
            if found:
                buffer[: len(found)] = found
                return len(found)


def _fault(file: Path, codec: str, reason: str) -> str:
    """Sentence on what no text of this encoding has: where it is, and how to mend it."""
    if codec != "utf-8-sig":
        return f"{file} begins as {codec.upper()} and is not ({reason}); write it again as UTF-8"
    offset = 0
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            at, zero = _first_fault(line), line.find(b"\0")
            if at >= 0:
                place = f"byte {offset + at}, line {number}"
                break
            offset += len(line)
        else:  # pragma: no cover - the file changed meanwhile
            return f"{file} is not UTF-8 text ({reason})"
    head = first_bytes(file, 4096)
    if zero >= 0 or b"\0" in head:
        if _text_in("UTF-8", head.replace(b"\0", b"")) and 4 * head.count(0) < len(head):
            fix = _unpacked_first(file, "tr -d '\\000' <")
            return f"{file} holds NUL bytes ({place}), which no text has; take them out: {fix}"
        if wide := _wide(head):
            return f"{file} is {wide} without a byte order mark ({place}); {iconv(file, wide)}"
        return (
            f"{file} is binary (it holds NUL bytes or what is no text: {place}); give a text, .jsonl or .parquet file"
        )
    found = f"{place}: {line[at]:#x}"
    cut = "; if its end is cut off, fetch it again" if reason == "unexpected end of data" else ""
    foreign = [byte for byte in head if byte > 0x7F]
    if 2 * len(foreign) > len(head):  # no text in Latin letters has as many
        fits = [name for name in _OTHER_SCRIPTS if _text_in(name, head)]
        those = f" (these fit: {', '.join(fits)})" if fits else ""
        return f"{file} is not UTF-8 text ({found}); {iconv(file, 'ENCODING')}, with the name of its own{those}{cut}"
    # in Latin-1 the codes from 0x80 to 0x9f are no characters; in Windows texts they are quotes and dashes
    guess = "WINDOWS-1252" if any(0x80 <= byte <= 0x9F for byte in line) else "ISO-8859-1"
    return (
        f"{file} is not UTF-8 text ({found}); if it is {guess}, {iconv(file, guess)}, else name its own encoding{cut}"
    )


def _first_fault(line: bytes) -> int:
    zero = line.find(b"\0")
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.start if zero < 0 else min(zero, error.start)
    return zero


def _wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by whether it makes a text of all bytes; of two byte orders the one of fewer alphabets."""
    fits = [name for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE") if _text_in(name, head)]
    return min(fits, key=lambda name: len({ord(char) >> 8 for char in head.decode(name, "replace")}), default=None)


def _text_in(encoding: str, head: bytes) -> bool:
    """Whether the beginning of a file is text in an encoding; a character that is cut off at its end may be so."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(char.isprintable() or char in "\n\r\t\f\u3000\xa0" for char in text)


def iconv(file: Path, encoding: str) -> str:
    """A command that writes a file again as UTF-8."""
    return _unpacked_first(file, f"iconv -f {encoding} -t UTF-8")


def _unpacked_first(file: Path, command: str) -> str:
    """A command that reads a file and writes another, with what has to be done before it."""
    if packed(file.suffix):
        return f"unpack it, then {command} {file.stem} > {file.stem}.utf8"
    return f"{command} {file.name} > {file.with_name(f'{file.stem}.utf8{file.suffix}').name}"

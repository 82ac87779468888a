"""Tokenizers: of anybody's folder, and over bytes for models made from a config, where no pretrained one exists.

256 byte symbols and one end-of-text symbol: any UTF-8 text round-trips, nothing is downloaded. The printable stand-ins
for bytes are those of GPT-2 (Radford et al. 2019, section 2.2), which the `tokenizers` library calls `ByteLevel`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from iskd.system.files import read_plain

EOS = "<|eos|>"
SENTENCE = "Once upon a time"
"""What a model is given where nobody says what it should continue."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
_OWN = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_LARGEST = 256 << 20  # bytes


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose id for a byte is the byte itself (0-255) and whose EOS, BOS and padding id is 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def check_tokenizer_files(folder: Path) -> None:
    """Look at what a tokenizer is read from before a library opens it, which would wait at a pipe.

    Raises:
        ValueError: a file of it is no plain file, or larger than 256 MiB.
        OSError: it cannot be read.
    """
    for name in (*TOKENIZER_FILES, "config.json"):
        if (folder / name).exists():
            read_plain(folder / name, max_bytes=_LARGEST, links=True)


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer in a folder, whatever is in them."""
    return any((folder / name).exists() for name in _OWN)


def load_tokenizer(place: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a name that was downloaded before; nothing is fetched.

    Args:
        place: a folder of anybody, or a name on the hub.
        trust_remote_code: whether code that comes with it may run.

    Raises:
        ValueError: it cannot be loaded, or has no tokens. The message names the file that is at fault, and the fix.
        OSError: there is none of this name on this machine.
    """
    folder = Path(place)
    try:
        if folder.is_dir():
            check_tokenizer_files(folder)
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, local_files_only=True, trust_remote_code=trust_remote_code
        )
        if not loaded.get_vocab():
            raise ValueError("it has no tokens")
    except MemoryError:
        raise
    except ImportError as error:
        raise ValueError(f"{place}: the tokenizer needs a package that is missing: {error!s:.600}") from error
    except Exception as error:  # the parser of tokenizer.json raises nothing narrower
        if isinstance(error, OSError) and not folder.is_dir():
            raise
        file, reason = _at_fault(folder, error)
        if not has_tokenizer(folder):
            file, reason = "tokenizer.json", "it is missing"
        raise ValueError(
            f"{place} has no tokenizer that can be loaded ({file}: {reason!s:.400}): copy the tokenizer's files that "
            "came with the weights"
        ) from error
    return loaded


def _at_fault(folder: Path, error: Exception) -> tuple[str, object]:
    """The file of a tokenizer that cannot be read by itself, and why; else all that there are."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for file in files:
        if file.suffix == ".json":
            try:
                value = json.loads(file.read_bytes())
            except (OSError, ValueError, RecursionError) as broken:
                return file.name, f"not valid JSON, {broken}"
            if not isinstance(value, dict):
                return file.name, f"must hold an object, got {type(value).__name__}"
        if file.name == "tokenizer.json":
            try:
                Tokenizer.from_file(str(file))
            except Exception as broken:
                return file.name, broken
    return " or ".join(file.name for file in files), error


# words, spaces, digits, marks, letters beyond ASCII: tokenizers of equal vocabularies may still cut these differently
_SAMPLE = "The caf\u00e9 costs 12.50,\n\n\tdon't  you   think? \u4f60\u597d"


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, texts: Sequence[str] = ()
) -> None:
    """Raise ValueError unless two tokenizers have the same tokens under the same ids and cut texts alike."""
    if student is teacher:
        return
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        token = next(token for token in sorted({*mine, *theirs}) if mine.get(token) != theirs.get(token))
        what = (
            f"{len(mine):,} and {len(theirs):,} tokens; {token!r} has id {mine.get(token)} in the student's, "
            f"{theirs.get(token)} in the teacher's"
        )
    else:
        cuts = ((text, student(text).input_ids, teacher(text).input_ids) for text in (*texts, _SAMPLE))
        different = next((found for found in cuts if found[1] != found[2]), None)
        if different is None:
            return
        text, cut, other = different
        what = (
            f"one vocabulary, but {text[:40]!r} is cut into {len(cut)} tokens by the student's and {len(other)} by the "
            "teacher's, or begins differently"
        )
    raise ValueError(
        f"student and teacher have different tokenizers ({what}): what they say is not about the same tokens; give the "
        "teacher that the student was made from, or look at each model alone"
    )

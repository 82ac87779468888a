"""A byte-level tokenizer for models made from a config, where no pretrained tokenizer exists.

256 byte symbols and one end-of-text symbol: any UTF-8 text round-trips, nothing is downloaded. The printable stand-ins
for bytes are those of GPT-2 (Radford et al. 2019, section 2.2), which the `tokenizers` library calls `ByteLevel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from iskd.system.files import read_plain

EOS = "<|eos|>"
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
    "config.json",
)
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
    for name in _FILES:
        if (folder / name).exists():
            read_plain(folder / name, max_bytes=_LARGEST, links=True)


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

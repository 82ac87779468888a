"""A byte-level tokenizer for models made from a config, where no pretrained tokenizer exists.

256 byte symbols and one end-of-text symbol: any UTF-8 text round-trips, nothing is downloaded. The printable stand-ins
for bytes are those of GPT-2 (Radford et al. 2019, section 2.2), which the `tokenizers` library calls `ByteLevel`.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS = "<|eos|>"


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

"""What begin tokens do for a teacher: perplexity of the same text under every `data.bos`, and under other framings.

    python -m benchmarks.begin_tokens MODEL FILE [--window 256] [--tokens 10240]

Only the text's own tokens are scored, never what frames them. Rows in brackets can be had by no key: they are what the
keys were chosen against.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from iskd.data import BOS, Framing, framing_of
from iskd.data.files.readers import read_file
from iskd.data.framing import separator
from iskd.evaluation.text import text_loss, text_windows


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=10240)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32, trust_remote_code=False)
    documents = list(read_file(Path(asked.file), "auto", "text"))
    parts = [part.strip() for text in documents for part in text.split("<|endoftext|>") if len(part.strip()) > 60]
    rows: dict[str, Framing] = {}
    for bos in (None, *BOS):
        if bos in (None, "none") or tokenizer.bos_token_id is not None:
            rows[f"data.bos={'null' if bos is None else bos}"] = framing_of(tokenizer, bos)
    _, end = separator(tokenizer)
    if tokenizer.bos_token_id is not None and end is not None:
        begin = (tokenizer.bos_token_id,)
        rows["(begin and end token)"] = Framing(head=begin, tail=(end,))
        rows["(begin token, at the head of every window too)"] = Framing(head=begin, window=begin)
    for name, frame in rows.items():
        windows = text_windows(parts, tokenizer, tokens=asked.tokens, window=asked.window, frame=frame)
        found = text_loss(model, windows, batch_tokens=4096, step=lambda *_: None)
        bits = f"{found.perplexity:.3f} | {found.bits_per_byte:.4f}"
        print(f"| {name} | {frame.told(tokenizer)} | {bits} | {int(windows.counts.sum()):,} |", flush=True)


if __name__ == "__main__":
    main()

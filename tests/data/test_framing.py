"""Laws of the framing: it is the tokenizer's own, whatever that does, and all that reads text uses it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from iskd.data import Framing, TextData, TextFiles, framing_of
from iskd.data.framing import template
from iskd.evaluation.likelihood import log_likelihoods
from iskd.evaluation.text import text_loss, text_windows
from iskd.models import IGNORE, Stack
from iskd.models.packing import Separator, positions_in, with_successor, within
from iskd.models.signals import next_tokens
from iskd.models.tokenizers import byte_tokenizer
from tests.factories import STORIES

WORDS = ["<unk>", "<s>", "</s>", "<lang>", "The", "cat", "sat", "on", "the", "mat", ".", "12", "a", "b", "c", "x"]
VOCAB = {word: number for number, word in enumerate(dict.fromkeys(WORDS))}
HERE: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "bos": ("<s> $A", (1,), ()),
    "eos": ("$A </s>", (), (2,)),
    "both": ("<s> $A </s>", (1,), (2,)),
    "none": ("$A", (), ()),
    "two in front": ("<s> <lang> $A", (1, 3), ()),
    "the unknown one": ("<unk> $A", (0,), ()),
}


def words(single: str = "$A", bos: str | None = "<s>", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, VOCAB[word]) for word in ("<unk>", "<s>", "</s>", "<lang>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>")


class Slow:
    """A tokenizer without a backend, with the flags of the Llama family."""

    is_fast, bos_token_id, eos_token_id = False, 1, 2

    def __init__(self, *, add_bos_token: bool, add_eos_token: bool) -> None:
        self.front, self.behind = [1] * add_bos_token, [2] * add_eos_token

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [3 + ord(letter) for letter in " " + text]
        return {"input_ids": [*self.front, *ids, *self.behind] if add_special_tokens else ids}


@pytest.mark.parametrize("name", HERE)
def test_the_template_is_what_comes_out(name: str) -> None:
    single, head, tail = HERE[name]
    tokenizer = words(single)
    assert template(tokenizer) == (head, tail)
    own = tokenizer("cat sat", add_special_tokens=False).input_ids
    found = framing_of(tokenizer)
    # what a stream of one document holds is what the tokenizer makes of it
    assert found.framed(own, first=True)[0] == tokenizer("cat sat").input_ids
    assert found == (Framing(head, tail) if head or tail else Framing(between=(2,)))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_flags_count_as_far_as_they_work(bos: bool, eos: bool) -> None:
    slow = cast(PreTrainedTokenizerBase, Slow(add_bos_token=bos, add_eos_token=eos))
    assert template(slow) == ((1,) * bos, (2,) * eos)


def test_modes_and_what_tells_documents_apart() -> None:
    plain, bos, both, gpt2 = words(), words("<s> $A"), words("<s> $A </s>"), words("</s> $A", bos="</s>")
    assert framing_of(plain, "document") == framing_of(bos, "document") == framing_of(bos) == Framing(head=(1,))
    assert framing_of(both, "none") == framing_of(plain) == Framing(between=(2,))
    assert framing_of(bos, "window") == Framing(between=(2,), window=(1,))
    assert framing_of(both, "bare") == framing_of(plain, "bare") == Framing()
    assert framing_of(both, "window") == Framing(tail=(2,), window=(1,))
    assert framing_of(gpt2) == Framing(head=(2,))
    begins, ends = Separator(1, begins=True), Separator(2)
    assert [framing_of(t).separator for t in (plain, bos, both, words("$A </s>"))] == [ends, begins, begins, ends]
    assert framing_of(bos, "window").separator == ends
    assert framing_of(gpt2, "window").separator == framing_of(gpt2).separator == Separator(2, begins=True)
    assert framing_of(bos, "bare").separator is None
    assert framing_of(words(bos=None, eos=None)).separator is None
    assert framing_of(bos).told(bos) == "a document is framed as <s> TEXT"
    with pytest.raises(ValueError, match=r"data\.bos='head' is unknown; use document, window, none, bare, or null"):
        framing_of(plain, "head")
    for mode in ("document", "window"):
        with pytest.raises(ValueError, match=rf"data\.bos={mode} puts the tokenizer's bos token in front, and .* none"):
            framing_of(words(bos=None), mode)


def test_a_token_that_begins_documents_belongs_to_what_follows() -> None:
    ids, apart = torch.tensor([[7, 8, 1, 5, 6, 1], [1, 5, 1, 1, 6, 7]]), Separator(1, begins=True)
    assert positions_in(ids, apart).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 0, 0, 1, 2]]
    labels = within(next_tokens(ids), ids, apart)
    off = IGNORE
    assert labels.tolist() == [[8, off, 5, 6, off, off], [5, off, off, 6, 7, off]]
    assert torch.equal(with_successor(ids, apart), (labels != off).flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("bos", [None, "document", "window", "none"])
def test_streams_are_framed_and_found_by_their_framing(bos: str | None, tmp_path: Path) -> None:
    path, seq_len = tmp_path / "text.txt", 16
    path.write_text("\n\n".join(f"{number} " + "cat sat on the mat . " * 60 for number in range(80)))
    tokenizer = words("<s> $A")

    def data(tokenizer: PreTrainedTokenizerFast, bos: str | None) -> TextData:
        return TextData(TextFiles(str(path)), tokenizer, cache_dir=tmp_path / "cache", seq_len=seq_len, bos=bos)

    module = data(tokenizer, bos)
    stream, manifest = module.windows("train").ravel(), module.manifest()
    assert manifest["framing"] == framing_of(tokenizer, bos).to_json()
    documents = manifest["documents"]["train"]
    heads = stream.reshape(-1, seq_len)[:, 0] == 1
    if bos == "window":
        assert heads.all()
        assert (stream == 1).sum() == len(heads)
        rest = stream[stream != 1]
    else:
        assert not heads.all()
        assert (stream == 1).sum() == (0 if bos == "none" else documents)
        rest = stream if bos == "none" else stream[stream != 1]
    # the text itself is the same whatever frames it
    other = data(tokenizer, "none").windows("train").ravel()
    kept = [values[values != 2][: 16 * 40] for values in (rest, other)]
    assert np.array_equal(*kept)
    # what iskd 0.1 wrote is what data.bos=none has, under the same name
    folders = {mode: data(tokenizer, mode).manifest()["cache"] for mode in (None, "none", "window")}
    assert len({*folders.values()}) == 3
    assert data(tokenizer, bos).manifest()["cache"] == folders.get(bos, folders[None])


@pytest.fixture(scope="module")
def stories() -> tuple[Any, PreTrainedTokenizerBase]:
    if not STORIES.is_dir():
        pytest.skip("stories260k is not at hand")
    return AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)


def test_a_model_trained_with_begin_tokens_is_scored_with_them(stories: tuple[Any, PreTrainedTokenizerBase]) -> None:
    """Texts, each in its own frame, are better predicted than without; what frames them is never scored."""
    model, tokenizer = stories
    told = [
        "Once upon a time, there was a little dog named Spot. Spot liked to play with his ball in the park.",
        "One day, a girl named Lily went to the park with her mom. She saw a big red ball and she was happy.",
    ] * 3
    nats = {}
    for bos in (None, "none"):
        windows = text_windows(told, tokenizer, tokens=10_000, window=128, frame=framing_of(tokenizer, bos))
        assert not ((windows.labels == 1) | (windows.labels == 2)).any()
        nats[bos] = text_loss(model, windows, batch_tokens=512, step=lambda *_: None).perplexity
    assert nats[None] < 0.95 * nats["none"]
    # a context begins as a document does
    pair = [("Once upon a time, there was a little", " girl")]
    own, bare = (
        log_likelihoods(model, tokenizer, pair, frame=frame).log_p.item()
        for frame in (framing_of(tokenizer), Framing(between=(2,)))
    )
    ids = tokenizer(pair[0][0] + pair[0][1]).input_ids
    tokens = log_likelihoods(model, tokenizer, pair).tokens.item()
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    slow = sum(log_p[at - 1, ids[at]].item() for at in range(len(ids) - int(tokens), len(ids)))
    assert own == pytest.approx(slow, rel=1e-4)
    assert own != pytest.approx(bare, rel=1e-4)


@torch.no_grad()
def test_documents_with_a_begin_token_are_kept_apart(stories: tuple[Any, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    stack, documents = Stack(model), [tokenizer(text).input_ids for text in ("The cat sat.", "A dog ran away.")]
    alone = [stack.last_hidden(torch.tensor([ids])) for ids in documents]
    stack.keep_apart(framing_of(tokenizer).separator)
    packed = stack.last_hidden(torch.tensor([[*documents[0], *documents[1]]]))
    assert torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-4)


def test_bytes_of_framed_windows_are_those_of_the_text() -> None:
    tokenizer = byte_tokenizer()
    for frame in (Framing(head=(256,)), Framing(tail=(256,)), Framing(head=(256, 256), tail=(256,))):
        windows = text_windows(["one", "tw\u00f6", "three"], tokenizer, tokens=100, window=100, frame=frame)
        assert windows.bytes == len("onetw\u00f6three".encode()) - (not frame.head)
        assert windows.counts.sum() == windows.bytes
    windows = text_windows(["abcdef"], tokenizer, tokens=100, window=4, frame=Framing(window=(256,)))
    assert windows.ids.tolist() == [[256, 97, 98, 99], [256, 100, 101, 102]]
    assert windows.bytes == 6

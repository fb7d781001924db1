"""The parts of a model as Llama is built, as the kernels need them, and whether they are still what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime import kernels, ops
from secateur.runtime.blocks import ATTENTION, NETWORK, NORMS, FastBlock, has_the_parts
from secateur.runtime.modules import Packed, SparseEmbedding, SparseLinear, TiedEmbedding, TiedLinear

_BASE = ("embed_tokens", "layers", "norm", "rotary_emb")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Wanted:
    """What the layer of a cache must be like."""

    groups: int
    head: int
    window: int
    """How many places a token attends to, itself among them; 0: all."""


class Plan:
    """What a token goes through."""

    def __init__(self, model: Any) -> None:
        """
        Args:
            model: of which `plan_of` saw that it has the parts.
        """
        library = kernels.find().module
        base, head = model._modules[model.base_model_prefix], model.get_output_embeddings()
        children: Any = base._modules
        embedding, self._rotary = children["embed_tokens"], children["rotary_emb"]
        blocks = list(children["layers"])
        owners = [one for one in (_owner(embedding), _owner(head)) if one is not None]
        self.dtype: torch.dtype = embedding.weight.dtype if isinstance(embedding, nn.Embedding) else owners[0].dtype
        self.rows: int = len(embedding.weight) if isinstance(embedding, nn.Embedding) else owners[0].entry.rows
        """Of the embedding."""
        self.activations: int = blocks[0].mlp.down_proj.activations
        self.head: nn.Module | None = head if type(head) is nn.Linear else None
        """Where PyTorch makes the logits."""
        self.output: Callable[..., Any] | None = None
        """The class of what the model returns, once the plan is proved."""
        rotated = int(self.turns(0, 1)[0].shape[-1])
        windows = windows_of(model.config)
        self.wanted: list[Wanted] = []
        layers = []
        for block, window in zip(blocks, windows, strict=True):
            attention, network = block.self_attn, block.mlp
            matrices = [getattr(attention, name) for name in ATTENTION] + [getattr(network, name) for name in NETWORK]
            norms = [_norm(getattr(block, name)) for name in NORMS]
            described = [ops.describe(one, one.bias) for one in matrices]
            made = library.Block(described, norms, int(attention.head_dim))
            turned = rotated if getattr(attention, "use_rope", True) else 0
            layers.append(library.Layer(made, turned, float(attention.scaling)))
            self.wanted.append(Wanted(made.groups, made.head, window))
        last = None if self.head is not None else ops.describe(owners[-1], getattr(head, "bias", None))
        self.decoder = library.Decoder(layers, _norm(children["norm"]), last)
        self.row = self._row_of(embedding, library)
        self._remember(model, base, embedding, head, blocks, owners)

    def turns(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of places, (count, rotated) each."""
        places = torch.arange(first, first + count)[None]
        cosines, sines = self._rotary(torch.empty(1, 1, 1, dtype=self.dtype), places)
        return cosines[0].contiguous(), sines[0].contiguous()

    def same(self) -> bool:
        """Whether all parts are those that were found, where they were, and nothing was hooked into them.

        Looked at before every token: the loops are those of C.
        """
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._found))
            and not any(self._hooks)
            and list(map(Tensor.data_ptr, self._plain)) == self._places
        )

    def _row_of(self, embedding: Any, library: Any) -> Callable[[int], Tensor]:
        if isinstance(embedding, nn.Embedding):
            weight = embedding.weight.detach()
            return lambda token: weight[token]
        matrix, size, dtype = ops.describe(_owner(embedding), None), self.decoder.hidden, self.dtype  # type: ignore[arg-type]

        def unpacked(token: int) -> Tensor:
            row = torch.empty(1, size, dtype=dtype)
            library.unpack(matrix, token, token + 1, row)
            return row

        return unpacked

    def _remember(
        self, model: Any, base: Any, embedding: Any, head: Any, blocks: list[Any], owners: list[Packed]
    ) -> None:
        """Write down where every part is found, so that `same` can look again."""
        found: list[tuple[dict[Any, Any], str, Any]] = [
            (model._modules, name, one) for name, one in model._modules.items()
        ]
        found += [(base._modules, name, one) for name, one in base._modules.items()]
        found += [(base._modules["layers"]._modules, name, one) for name, one in base.layers._modules.items()]
        parts = [base, embedding, head, *base._modules.values(), *owners]
        for block in blocks:
            for owner in (block, block.self_attn, block.mlp):
                found += [(owner._modules, name, one) for name, one in owner._modules.items()]
                parts += [owner, *owner._modules.values()]
        parts = list({id(part): part for part in parts}.values())
        self._plain: list[Tensor] = []
        for part in parts:
            found.append((vars(part), "forward", vars(part).get("forward")))
            found += [(part._parameters, name, one) for name, one in part._parameters.items()]
            found += [(part._buffers, name, one) for name, one in part._buffers.items() if name in ("values", "starts")]
            self._plain += [one for one in part._parameters.values() if one is not None]
        self._dicts, self._names, self._found = map(list, zip(*found, strict=True))
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._places = list(map(Tensor.data_ptr, self._plain))
        self._held = parts  # and with them their tensors


def plan_of(model: Any) -> Plan | None:
    """The plan of a model that has the parts and nothing else, none of them touched; else None."""
    try:
        if not _has_the_parts(model):
            return None
        plan = Plan(model)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return None  # it is built otherwise
    forwards = [(part, vars(part).get("forward")) for part in plan._held]
    untouched = all(own is None or (isinstance(own, FastBlock) and own.block is part) for part, own in forwards)
    return plan if untouched and not any(plan._hooks) else None


def windows_of(config: Any) -> list[int]:
    """To how many places a token of each block attends, itself among them; 0: all.

    Raises:
        ValueError: when one attends in another way.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    found = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(type(layer).__name__)
        found.append(int(getattr(layer, "sliding_window", 0)))
    if set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}:
        raise ValueError(str(config.layer_types))
    return found


def _has_the_parts(model: Any) -> bool:
    base, head = model._modules.get(model.base_model_prefix), model.get_output_embeddings()
    if base is None or head is None or {id(one) for one in model._modules.values()} != {id(base), id(head)}:
        return False
    children: Any = base._modules
    config = model.config
    embedding, rope = children.get("embed_tokens"), getattr(children.get("rotary_emb"), "rope_type", None)
    windows = windows_of(config)
    blocks: Any = children.get("layers")
    return (
        set(children) == set(_BASE)
        and type(blocks) is nn.ModuleList
        and len(blocks) == config.num_hidden_layers == len(windows)
        and all(map(has_the_parts, blocks))
        and all(_attends(block.self_attn, config, window) for block, window in zip(blocks, windows, strict=True))
        # Frequencies that depend on the length are not those of a table.
        and isinstance(rope, str) and "dynamic" not in rope and rope != "longrope"
        and type(embedding) in (nn.Embedding, SparseEmbedding, TiedEmbedding)
        and getattr(embedding, "max_norm", None) is None
        and type(head) in (nn.Linear, SparseLinear, TiedLinear)
        and all(_runs(one) for one in (_owner(embedding), _owner(head)))
        and all(one.dtype in _DTYPES for one in base.parameters())
    )  # fmt: skip


def _attends(attention: Any, config: Any, window: int) -> bool:
    return attention.config is config and (getattr(attention, "sliding_window", None) or 0) in (0, window)


def _runs(owner: Packed | None) -> bool:
    return owner is None or (owner.activations is not None and owner.entry.columns <= ops.MOST_COLUMNS)


def _owner(module: Any) -> Packed | None:
    """The packed module whose weight a module uses."""
    if isinstance(module, TiedLinear | TiedEmbedding):
        return module._owner[0]
    return module if isinstance(module, Packed) else None


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight.detach(), float(module.variance_epsilon)

"""Blocks as Llama has them: all that one token needs of a block but its attention in two calls of the kernels.

Step by step a token costs some thirty small operations of PyTorch in each block, which in a small model take longer
than the products. Here norm, query, key and value and the rotation of places are one call, and what comes behind the
attention another; cache and attention stay those of transformers, so that any cache, mask and window works.

Whether a block is such a one is not told by the name of its class: modules with the usual names are taken, and then the
block itself and the two calls must give the same for random inputs, else it stays as it is. Of blocks that differ in
their numbers only, the first is compared: that takes longer than reading their weights. Prompts, batches,
gradients, what is traced, and blocks that something was hooked into go through the block's own forward.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from secateur.runtime import kernels, ops
from secateur.runtime.modules import SparseLinear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NETWORK = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
_TAKEN = frozenset({"attention_mask", "past_key_values", "position_embeddings"})
IMPLEMENTATIONS = ("eager", "sdpa")
"""Of attention: those that take a window as a mask."""
_NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 5e-3}
"""How far outputs may be from the block's own, by the largest; activations are not rounded to 8 bits then."""


class FastBlock:
    """The forward of a block, in the place of its own, which it calls for whatever it does not do."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        children: Any = block._modules
        self.attention: Any = children["self_attn"]
        inside, network = self.attention._modules, children["mlp"]._modules
        places = [(inside, name) for name in ATTENTION] + [(network, name) for name in NETWORK]
        places += [(children, name) for name in (*NORMS, "self_attn", "mlp")] + [(network, "act_fn")]
        self._parts: list[tuple[Any, str, Any]] = [(modules, name, modules[name]) for modules, name in places]
        self._matrices: list[SparseLinear] = [part for _, _, part in self._parts[:7]]
        self._norms: list[Any] = [part for _, _, part in self._parts[7:9]]
        self._plain = getattr(sys.modules[type(self.attention).__module__], "eager_attention_forward", None)
        self._made: tuple[list[int], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": None}  # a copy has other addresses

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or args or not self._can(hidden_states, kwargs.get("position_embeddings")):
            return type(self.block).forward(self.block, hidden_states, *args, **kwargs)
        return self._one_token(hidden_states, kwargs)

    def _can(self, x: Tensor, embeddings: Any) -> bool:
        return (
            isinstance(embeddings, tuple)
            and x.numel() == self._matrices[0].entry.columns
            and all(one.dtype == x.dtype and one.numel() == one.shape[-1] for one in embeddings)
            and type(x) is Tensor
            and not torch.is_grad_enabled()
            and not is_in_torch_dispatch_mode()
            and not self.block.training
            and ops.runs(self._matrices[0].entry, x)
            and self.attention.config._attn_implementation in IMPLEMENTATIONS
            and self._untouched()
        )

    def _untouched(self) -> bool:
        """Whether the parts are those that were found, and nothing was hooked into them."""
        return all(
            modules.get(name) is part and not part._forward_hooks and not part._forward_pre_hooks
            for modules, name, part in self._parts
        )

    def _one_token(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        attention = self.attention
        made = self._describe()
        threads, activations = torch.get_num_threads(), self._matrices[0].activations
        x = x.contiguous()
        cosines, sines = kwargs["position_embeddings"]
        turned = torch.empty(1, made.rows // made.head, 1, made.head, dtype=x.dtype)
        made.before(x, cosines.contiguous(), sines.contiguous(), turned, activations, threads)
        heads = made.queries // made.head
        groups = (made.rows // made.head - heads) // 2
        query, key, value = torch.split_with_sizes(turned, [heads, groups, groups], 1)
        past = kwargs.get("past_key_values")
        if past is not None:
            key, value = past.update(key, value, attention.layer_idx)
        attend = _interfaces().get_interface(attention.config._attn_implementation, self._plain)
        others = {name: one for name, one in kwargs.items() if name not in _TAKEN}
        attended, _ = attend(
            attention, query, key, value, kwargs.get("attention_mask"), dropout=0.0, scaling=attention.scaling, **others
        )
        out = torch.empty_like(x)
        made.behind(attended.contiguous(), x, out, activations, threads)
        return out

    def _describe(self) -> Any:
        """The block as the kernels see it; made anew when one of its tensors has moved."""
        tensors = [
            one for module in self._matrices for one in (*module._buffers.values(), module._parameters.get("bias"))
        ]
        tensors += [norm._parameters["weight"] for norm in self._norms]
        places = [0 if one is None else one.data_ptr() for one in tensors]
        if self._made is None or self._made[0] != places:
            norms = [(norm.weight.detach(), float(norm.variance_epsilon)) for norm in self._norms]
            matrices = [ops.describe(module, module.bias) for module in self._matrices]
            self._made = places, kernels.find().module.Block(matrices, norms, int(self.attention.head_dim))
        return self._made[1]


def speed_up(model: nn.Module) -> int:
    """Give the blocks of a model that are as Llama's a faster forward for single tokens, where the kernels have it.

    Args:
        model: with its weights, not yet called.

    Returns:
        How many blocks got it.
    """
    rotary = next((part for name, part in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    if rotary is None or not hasattr(kernels.find().module, "Block"):
        return 0
    found, agreed = 0, set()
    for block in model.modules():
        if has_the_parts(block):
            fast = FastBlock(block)
            way = _way(fast)
            if way in agreed or _agree(block, fast, rotary):
                agreed.add(way)
                block.forward = fast
                found += 1
    return found


@functools.cache
def _interfaces() -> Any:
    """Of attention; not imported above, since transformers imports this package while it is imported itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def has_the_parts(block: nn.Module) -> bool:
    """Whether a module has the parts of such a block, all of its matrices packed, and no others."""
    children: Any = block._modules
    if set(children) != {"self_attn", "mlp", *NORMS}:
        return False
    inside, network = children["self_attn"]._modules, children["mlp"]._modules
    matrices = [inside.get(name) for name in ATTENTION] + [network.get(name) for name in NETWORK]
    return (
        set(inside) == set(ATTENTION)
        and set(network) == {*NETWORK, "act_fn"}
        and all(isinstance(one, SparseLinear) and one.activations is not None for one in matrices)
        and all(hasattr(children[name], "variance_epsilon") for name in NORMS)
        and all(hasattr(children["self_attn"], name) for name in ("config", "head_dim", "layer_idx", "scaling"))
    )


@torch.no_grad()
def _agree(block: nn.Module, fast: FastBlock, rotary: nn.Module) -> bool:
    """Whether block and calls do the same to a token behind three others."""
    from transformers.cache_utils import DynamicCache

    norm = fast._norms[0].weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, len(norm), generator=generator).to(norm.dtype)
    outs: list[Any] = []
    was_training, rounded = block.training, fast._matrices[0].activations
    block.eval()
    for matrix in fast._matrices:
        matrix.activations = kernels.find().module.ACTIVATIONS["float"]
    try:
        for forward in (block.forward, fast):
            past = DynamicCache()
            for first, last in ((0, 3), (3, 4)):
                places = torch.arange(first, last)[None]
                cosines, sines = rotary(x, places)
                given = {"position_embeddings": (cosines, sines), "position_ids": places, "past_key_values": past}
                found = (block.forward if first == 0 else forward)(x[:, first:last], attention_mask=None, **given)
            outs.append(found)
            if forward is fast and not fast._can(x[:, 3:], (cosines, sines)):
                return False
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return False  # it is built otherwise
    finally:
        block.train(was_training)
        for matrix in fast._matrices:
            matrix.activations = rounded
    own, ours = outs
    if not isinstance(own, Tensor) or own.shape != ours.shape:
        return False
    return bool((own.double() - ours.double()).abs().max() <= _NEAR[norm.dtype] * own.double().abs().max())


def _way(fast: FastBlock) -> tuple[Any, ...]:
    """All that tells how a block computes, but for its tensors and its place in the model."""
    own: list[Any] = []
    for part in (fast.block, *(part for _, _, part in fast._parts)):
        settings = {name: value for name, value in vars(part).items() if isinstance(value, str | int | float | None)}
        settings.pop("layer_idx", None)
        forward = vars(part).get("forward")  # one that was put into this module alone
        own.append((type(part), tuple(sorted(settings.items())), None if forward is None else id(forward)))
    layouts = [(replace(one.entry, values=0), one.bias is None) for one in fast._matrices]
    return *own, *layouts, *(norm.weight.dtype for norm in fast._norms)

"""Low-rank adapters that keep the zeros: the layer computes with W + M∘(s·BA), so merging changes nothing.

M is 1 where a weight is kept. A plain adapter adds B(Ax) beside the layer: its product BA is dense, and merging it
fills the zeros. Here the masked sum is built for each product and thrown away again: memory of the adapter's size, at
the price of one product BA for each layer and direction. Source: SQFT/SparsePEFT (arXiv 2410.03750), MaskLoRA in PERP
(arXiv 2312.15230); the adapter itself is PEFT's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import MissingExtraError, UnsupportedModelError
from secateur.recovery.zeros import HeldZeros
from secateur.seeds import derived_seed


class _MaskedProduct(torch.autograd.Function):
    """x (W + fill(s·BA))ᵀ + b, the sum built anew in backward instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, held: bool,
        scale: float, transposed: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, a, b)
        ctx.held, ctx.scale, ctx.transposed, ctx.dtype = held, scale, transposed, dtype
        total = merged_weight(weight, a, b, held, scale, transposed).to(dtype)
        return F.linear(x.to(dtype), total.T if transposed else total, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        x, weight, a, b = ctx.saved_tensors
        dy = outputs[0].to(ctx.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            total = merged_weight(weight, a, b, ctx.held, ctx.scale, ctx.transposed).to(ctx.dtype)
            dx = (dy @ (total.T if ctx.transposed else total)).to(x.dtype)
            del total
        delta = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(ctx.dtype)  # (out, in)
        delta = delta.float()
        if ctx.held:
            delta.masked_fill_((weight.T if ctx.transposed else weight) == 0, 0)
        delta *= ctx.scale
        return dx, None, None, b.float().T @ delta, delta @ a.float().T, None, None, None, None


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, held: bool, scale: float, transposed: bool = False) -> Tensor:
    """W + M∘(s·BA) in W's number format; exactly +0.0 where W is zero and ``held``.

    Args:
        weight: (out, in), or (in, out) when ``transposed``.
        a: (rank, in); b: (out, rank).
        held: whether the zeros of ``weight`` stay; it is frozen, so it is its own mask.
    """
    with torch.autocast(weight.device.type, enabled=False):  # the same sum in training and in merging
        delta = (b.float() @ a.float()).mul_(scale)
    total = (delta.T if transposed else delta).add(weight.float()).to(weight.dtype)
    return total.masked_fill_(weight == 0, 0) if held else total


def add_adapters(model: nn.Module, held: HeldZeros, weights: Mapping[str, Tensor], *, rank: int, seed: int) -> Any:
    """Wrap a model's prunable linear layers in masked adapters; everything else is frozen.

    Args:
        weights: the prunable tensors by name; those of fused experts get no adapter.

    Returns:
        The PEFT model. `merge_adapters` gives the plain model back.

    Raises:
        MissingExtraError: without PEFT.
        UnsupportedModelError: when no layer can take an adapter.
    """
    try:
        import peft
        from peft.tuners.lora.layer import Linear as LoraLinear
    except ImportError:
        raise MissingExtraError("--mode lora needs PEFT", hint="pip install 'secateur[recover]'") from None

    layers = {}
    for name in weights:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(owner), nn.Linear | Conv1D):
            layers[owner] = name in held.pruned
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer for an adapter", hint="use --mode full or blocks"
        )

    class MaskedLora(LoraLinear):
        """PEFT's layer with the masked product in place of the sum of two products."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
            super().__init__(base_layer, adapter_name, **options)
            self.held = False
            """Whether the zeros of the layer below stay zero."""

        def get_delta_weight(self, adapter: str) -> Tensor:
            base = self.get_base_layer().weight
            delta: Tensor = self._total(adapter, base) - base
            return delta

        def _total(self, adapter: str, base: Tensor) -> Tensor:
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            return merged_weight(base, a, b, self.held, self.scaling[adapter], self.fan_in_fan_out)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Write the masked sum itself: adding and subtracting would round the kept weights twice."""
            base = self.get_base_layer().weight
            for adapter in adapter_names or self.active_adapters:
                if adapter in self.lora_A and adapter not in self.merged_adapters:
                    base.data = self._total(adapter, base.data)
                    self.merged_adapters.append(adapter)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                result: Tensor = super().forward(x, *args, **kwargs)
                return result
            (adapter,) = self.active_adapters
            base = self.get_base_layer()
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
            product: Tensor = _MaskedProduct.apply(
                x, base.weight, base.bias, self.lora_A[adapter].weight, self.lora_B[adapter].weight,
                self.held, self.scaling[adapter], self.fan_in_fan_out, dtype,
            )  # fmt: skip
            return product

    turned = {isinstance(model.get_submodule(path), Conv1D) for path in layers}
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(layers), bias="none", fan_in_fan_out=turned == {True}
    )
    config._register_custom_module({nn.Linear: MaskedLora, Conv1D: MaskedLora})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    for path, keeps_zeros in layers.items():
        layer = wrapped.base_model.model.get_submodule(path)
        assert isinstance(layer, MaskedLora)
        layer.held = keeps_zeros
        layer.fan_in_fan_out = isinstance(layer.get_base_layer(), Conv1D)
        for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            factor.data = factor.data.float()
        own = torch.Generator().manual_seed(derived_seed(seed, path))
        start = torch.empty(layer.lora_A["default"].weight.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=own)
        layer.lora_A["default"].weight.data.copy_(start)
    return wrapped


def merge_adapters(wrapped: Any) -> Any:
    """The plain model, its weights those the adapters computed with."""
    return wrapped.merge_and_unload()

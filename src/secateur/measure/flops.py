"""Floating-point operations for one token, by PyTorch's flop counter: two for every multiply-add of a matrix product.

The model runs without weights, so that its size does not matter: once over a context, then one token more with the
key-value cache. Attention is computed the plain way, as products of matrices, which the counter knows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.engine.blocks import MatrixSpec, find_structure
from secateur.engine.inputs import is_vision
from secateur.errors import UnsupportedModelError


@dataclass(frozen=True)
class Flops:
    """Operations of one token."""

    per_token: float
    sparse_per_token: float
    """Without the multiplications by weights that are zero."""
    protocol: str


def count_flops(
    skeleton: transformers.PreTrainedModel, zeros: Mapping[str, float] | None = None, *, context: int = 256
) -> Flops:
    """Count what one token takes.

    Args:
        skeleton: a model without weights (`build_skeleton`); it is not changed.
        zeros: prunable matrix -> share of its weights that are zero.
        context: tokens before the one that is counted; for a model that does not decode, tokens of the text whose mean
            is taken.

    Raises:
        UnsupportedModelError: when the forward cannot be followed without weights, as where data chooses the experts.
    """
    if is_vision(skeleton) or skeleton.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"operations of one token are not defined for {type(skeleton).__name__}", hint="it takes no row of tokens"
        )
    model = copy.deepcopy(skeleton).to("meta").eval()
    model.set_attn_implementation("eager")
    for part in {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values():
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "batched_mm"  # the same work whichever experts are chosen
        part.pad_token_id = None  # it would be looked for in the text
    counter = FlopCounterMode(display=False)
    decodes = model.can_generate()
    tokens = torch.zeros((1, context), dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            if decodes:
                past = model(tokens, use_cache=True).past_key_values
                with counter:
                    model(tokens[:, :1], past_key_values=past, use_cache=True)
            else:
                with counter:
                    model(tokens)
    except Exception as error:
        # Whatever a forward does with numbers that are not there.
        raise UnsupportedModelError(
            f"operations of {type(skeleton).__name__} cannot be counted without its weights: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="where data decides what is computed, as with experts, no count holds for every token",
        ) from error
    each = 1 if decodes else context
    total = counter.get_total_flops()
    spared = _spared(counter, model, find_structure(skeleton).matrices, zeros or {})
    where = f"one token after {context}, with the key-value cache" if decodes else f"mean of {context} tokens"
    return Flops(total / each, (total - spared) / each, f"PyTorch's flop counter, {where}, plain attention")


def _spared(
    counter: FlopCounterMode, model: nn.Module, matrices: Iterable[MatrixSpec], zeros: Mapping[str, float]
) -> float:
    """Operations on weights that are zero: of a module with several matrices, in proportion to their sizes."""
    counts: dict[str, Any] = dict(counter.get_flop_counts())
    root = type(model).__name__
    by_module: dict[str, list[MatrixSpec]] = {}
    for matrix in matrices:
        by_module.setdefault(matrix.module, []).append(matrix)
    spared = 0.0
    for module, own in by_module.items():
        flops = sum(counts.get(f"{root}.{module}", {}).values())
        share = sum(zeros.get(one.name, 0.0) * one.size for one in own) / sum(one.size for one in own)
        spared += flops * share
    return spared

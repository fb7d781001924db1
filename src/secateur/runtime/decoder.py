"""A single token through all blocks of a model as Llama is built in one call of the kernels, nothing of Python between.

It takes the place of the model's own forward, so that `generate`, with whatever processors, criteria and streamers,
pipelines and loops of one's own have it. A `DynamicCache` stays what it is: its layers show what the kernels hold
(`secateur.runtime.cache`). Prompts and all that is unusual go through the model's own forward.

Whether a model is such a one is found at its first single token: embedding, packed blocks (`secateur.runtime.blocks`),
norm, rotary embedding and head are taken by their usual names, and then logits must be the model's own for random
tokens, else it stays as it is. `SECATEUR_DECODER=off` leaves it out.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from secateur.runtime import kernels
from secateur.runtime.blocks import IMPLEMENTATIONS, has_the_parts
from secateur.runtime.modules import Packed
from secateur.runtime.plan import Plan, plan_of

_NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""How far logits may be from the model's own, by their norm; activations are not rounded to 8 bits then."""
_NO_PART = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
"""Arguments and entries of a config with which nothing but logits and cache is asked for."""
_PROMPT, _TOKENS = 5, 3
"""Of the comparison."""


class FastModel:
    """The forward of a model, in the place of its own, which it calls for whatever it does not do."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._plan: Plan | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own: `generate` looks at it."""
        return inspect.signature(MethodType(type(self.model).forward, self.model))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plan": None}  # a copy has other tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) <= 1:
            given = {"input_ids": args[0], **kwargs} if args else kwargs
            plan = self._can(given)
            logits = None if plan is None else self._one_token(plan, given)
            if plan is not None and plan.output is not None and logits is not None:
                return plan.output(logits=logits, past_key_values=given["past_key_values"])
        return type(self.model).forward(self.model, *args, **kwargs)

    def _can(self, given: dict[str, Any]) -> Plan | None:
        """What the token goes through, where it may."""
        ids = given.get("input_ids")
        may = (
            type(ids) is Tensor
            and ids.numel() == 1
            and ids.dim() == 2
            and given.get("past_key_values") is not None
            and ids.device.type == "cpu"
            and self._asks_for_nothing_else(given)
        )
        return self.plan() if may else None

    def plan(self) -> Plan | None:
        """What single tokens go through now, once it is proved; None where they go through the model's own forward."""
        model = self.model
        may = (
            not torch.is_grad_enabled()
            and not model.training
            and not is_in_torch_dispatch_mode()
            and not torch_module._has_any_global_hook()
            and all(getattr(model.config, name, usual) is usual for name, usual in _NO_PART.items())
            and model.config._attn_implementation in IMPLEMENTATIONS
        )
        if not may:
            return None
        plan = self._plan
        if plan is None or not plan.same():
            plan = self._plan = plan_of(model)
            if plan is None:
                return None
            plan.output = self._prove(plan)
        return plan if plan.output is not None else None

    def _asks_for_nothing_else(self, given: dict[str, Any]) -> bool:
        for name, value in given.items():
            if name in ("input_ids", "past_key_values", "attention_mask", "position_ids") or value is None:
                continue
            if name == "logits_to_keep":
                if type(value) is not int:
                    return False
            elif name == "use_cache":
                if value is not True:
                    return False
            elif name not in _NO_PART or value is not _NO_PART[name]:
                return False
        return True

    def _one_token(self, plan: Plan, given: dict[str, Any], activations: int | None = None) -> Tensor | None:
        """Logits, (1, 1, vocabulary); None where the token must go another way, nothing being changed then."""
        from secateur.runtime.cache import held_by, hold, room_for, tokens_in

        ids, cache = given["input_ids"], given["past_key_values"]
        held = held_by(cache, plan)
        full = held is not None and held.cache.steps >= held.cache.room
        taken = None if full else held
        before = tokens_in(cache, plan.wanted, plan.dtype) if taken is None else taken.tokens + taken.cache.steps
        token = int(ids)
        if not before or not 0 <= token < plan.rows or not _at(before, given):
            return None
        if taken is None:
            cosines, sines = plan.turns(before, room_for(before))
            taken = hold(cache, plan, plan.wanted, before, cosines, sines, kernels.find().module)
        out = torch.empty(1, 1, plan.decoder.outputs, dtype=plan.dtype)
        if activations is None:
            activations = plan.activations
        plan.decoder.step(taken.cache, plan.row(token), out, activations, torch.get_num_threads())
        return out if plan.head is None else plan.head(out)

    def _prove(self, plan: Plan) -> Callable[..., Any] | None:
        """The class of the model's outputs when the plan gives the model's own logits; else None."""
        from transformers.cache_utils import DynamicCache

        model = self.model
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(plan.rows, (1, _PROMPT + _TOKENS), generator=generator)
        packed = [part for part in model.modules() if isinstance(part, Packed)]
        rounded = [part.activations for part in packed]
        exact = int(kernels.find().module.ACTIVATIONS["float"])
        ours, theirs = [], []
        try:
            for part in packed:
                part.activations = None if part.activations is None else exact
            past = DynamicCache(config=model.config)
            own = type(model).forward
            own(model, input_ids=ids[:, :_PROMPT], past_key_values=past, use_cache=True)
            our_past = copy.deepcopy(past)
            for place in range(_PROMPT, _PROMPT + _TOKENS):
                token = ids[:, place : place + 1]
                found = own(model, input_ids=token, past_key_values=past, use_cache=True)
                logits = self._one_token(plan, {"input_ids": token, "past_key_values": our_past}, exact)
                if logits is None or logits.shape != found.logits.shape or logits.dtype != found.logits.dtype:
                    return None
                if {name for name, value in found.items() if value is not None} != {"logits", "past_key_values"}:
                    return None
                ours.append(logits.double())
                theirs.append(found.logits.double())
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
            return None  # it is built otherwise
        finally:
            for part, before in zip(packed, rounded, strict=True):
                part.activations = before
        off = (torch.cat(ours) - torch.cat(theirs)).norm()
        return type(found) if bool(off <= _NEAR[plan.dtype] * torch.cat(theirs).norm()) else None


def take_single_tokens(model: Any) -> bool:
    """Give a model whose blocks are as Llama's a faster forward for single tokens, where the kernels have it.

    Args:
        model: with its weights; one without a head stays as it is.

    Returns:
        Whether it got it. At the first token it is compared with the model's own, and not taken when it differs.
    """
    if not kernels.decodes() or not any(has_the_parts(part) for part in model.modules()) or plan_of(model) is None:
        return False
    model.forward = FastModel(model)
    return True


def _at(place: int, given: dict[str, Any]) -> bool:
    """Whether the token stands behind ``place`` others, all of which it may see."""
    mask, places = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (
        type(mask) is Tensor and mask.shape == (1, place + 1) and not mask.is_floating_point() and bool(mask.all())
    ):
        return False
    return places is None or (type(places) is Tensor and places.numel() == 1 and int(places) == place)

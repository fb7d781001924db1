"""Text after a prompt without the machinery of `generate`: a loop of our own around the decoder, token by token.

In a small model a token takes the kernels less time than `generate` spends on it in Python. Where a model goes through
all blocks in one call (`secateur.runtime.decoder`) and its generation config asks for nothing but the likeliest token,
or one that is drawn at a temperature, the tokens of `continue_tokens` are those of `generate`, with the same random
state. It says None where they might not be, and `generate` is to be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from secateur.runtime import kernels
from secateur.runtime.decoder import FastModel
from secateur.runtime.plan import Plan

_HARMLESS = {
    "bos_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "pad_token_id", "transformers_version",
    "use_cache",
}  # fmt: skip
"""Of a generation config: what changes no token, or is looked at here."""
_DRAWING = {"temperature", "top_k", "top_p"}
"""What changes none where nothing is drawn; a caller here always says the temperature, and takes all tokens."""


def continue_tokens(
    model: Any,
    prompt: Tensor,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    stop: bool = True,
    told: Callable[[int], None] | None = None,
) -> list[int] | None:
    """What `model.generate(prompt, max_new_tokens=new_tokens, ...)` puts behind a prompt, sooner.

    Args:
        model: of transformers, evaluating, on the CPU.
        prompt: (1, tokens), all of them seen.
        temperature: 0 takes the likeliest token; else tokens are drawn as `do_sample=True, top_k=0` does.
        stop: end behind a token that ends a text, of the generation config.
        told: is given each token when it is there.

    Returns:
        The new tokens; None where the model, or what its generation config asks for, is not for this loop: nothing has
        been told or drawn then.
    """
    # They are imported here since transformers imports this package while it is imported itself.
    from transformers.cache_utils import DynamicCache

    from secateur.runtime.cache import tokens_in

    one = prompt.dim() == 2 and prompt.shape[0] == 1 and prompt.shape[1] > 0 and prompt.device.type == "cpu"
    if new_tokens < 1 or not one or not _usual(model, drawn=temperature > 0):
        return None
    with torch.inference_mode():
        plan = _plan(model)
        if plan is None:
            return None
        ends = _ends(model) if stop else frozenset()
        past = DynamicCache(config=model.config)
        first = model(input_ids=prompt, past_key_values=past, use_cache=True, logits_to_keep=1).logits[0, -1:]
        if new_tokens > 1 and tokens_in(past, plan.wanted, plan.dtype) != prompt.shape[1]:
            return None
        found: list[int] = []
        for logits in _logits(plan, past, first, prompt.shape[1], new_tokens, found):
            token = _likeliest(logits) if temperature == 0 else _drawn(logits, temperature)
            found.append(token)
            if told is not None:
                told(token)
            if token in ends:
                break
    return found


def _logits(plan: Plan, past: Any, first: Tensor, before: int, count: int, found: list[int]) -> Iterator[Tensor]:
    """Of ``count`` places; ``first`` are those behind the prompt, ``found`` holds the tokens chosen so far."""
    from secateur.runtime.cache import MOST_ROOM, hold

    yield first
    module, threads = kernels.find().module, torch.get_num_threads()
    out = torch.empty(1, plan.decoder.outputs, dtype=plan.dtype)
    last, held = before + count - 1, None
    while before < last:
        if held is None or held.cache.steps >= held.cache.room:
            room = min(last - before, MOST_ROOM)
            held = hold(past, plan, plan.wanted, before, *plan.turns(before, room), module)
        plan.decoder.step(held.cache, plan.row(found[-1]), out, plan.activations, threads)
        before += 1
        yield out if plan.head is None else plan.head(out)


def _plan(model: Any) -> Plan | None:
    """What single tokens of the model go through, once it is proved; None where they do not."""
    fast = vars(model).get("forward")
    return fast.plan() if isinstance(fast, FastModel) else None


def _usual(model: Any, *, drawn: bool) -> bool:
    """Whether nothing of the generation config has a say in the tokens that is not looked at here."""
    config = getattr(model, "generation_config", None)
    if config is None or config.use_cache is False:
        return False
    asked = {name for name, value in config.to_diff_dict().items() if _says(name, value)}
    others = asked - _HARMLESS
    if not drawn:
        return others <= _DRAWING
    return others <= _DRAWING and config.top_p in (None, 1.0)


def _says(name: str, value: Any) -> bool:
    return value is not None and value is not False and not name.startswith("_")


def _ends(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset() if ends is None else frozenset(ends if isinstance(ends, list | tuple) else [ends])


def _likeliest(logits: Tensor) -> int:
    """The first of those with the highest logit."""
    # PyTorch wakes threads of its own for this, which then are in the way of those of the kernels.
    highest = getattr(kernels.find().module, "highest", None)
    return int(logits.argmax()) if highest is None else int(highest(logits))


def _drawn(logits: Tensor, temperature: float) -> int:
    """As `generate` draws it, step by step, so that the same random numbers give the same token."""
    probabilities = torch.nn.functional.softmax(logits.float() / temperature, dim=-1)
    return int(torch.multinomial(probabilities, num_samples=1))

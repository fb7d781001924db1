"""What a mixture of experts does with each token: which experts it is routed to, and what each of them adds.

The experts of a block are one module that is called with tokens and their routing. Nothing is known about what is
inside: what one expert adds is what the same module answers when only its tokens are handed in, routed to it alone.
Whether a call was understood is tried: what all experts add must sum up to what the whole call gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import CalibrationError

NEVER = -1e9
"""Logit, and additive bias, of an expert that must not be chosen: finite, so that 0·NEVER is no NaN."""
PRODUCTS = {"linear", "matmul", "mm", "__matmul__", "addmm"}


@dataclass(frozen=True)
class Call:
    """One call of an experts module whose arguments are understood."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: int | str
    """Place of the tokens among the arguments."""
    chosen: int | str
    """Place of the experts of each token: numbers (tokens, k), or one-hot (tokens, k, experts)."""
    weights: int | str
    """Place of their weights, (tokens, k)."""

    def __getitem__(self, place: int | str) -> Tensor:
        tensor: Tensor = self.args[place] if isinstance(place, int) else self.kwargs[place]
        return tensor

    def rerun(self, values: dict[int | str, Tensor]) -> Tensor:
        """The module's answer with some of the arguments replaced."""
        args = [values.get(place, value) for place, value in enumerate(self.args)]
        output: Tensor = self.module.forward(*args, **{key: values.get(key, v) for key, v in self.kwargs.items()})
        return output

    def contributions(self, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Expert, numbers of its tokens (n,), and what it adds to each, (n, features); only experts that have any."""
        states, chosen, weights = self[self.states], self[self.chosen], self[self.weights]
        rows = states.reshape(-1, states.shape[-1])
        numbers = chosen if chosen.ndim == 2 else chosen.argmax(-1).masked_fill(chosen.sum(-1) == 0, experts)
        for expert in numbers.unique().tolist():
            if expert >= experts or expert < 0:
                continue  # a token that no expert takes
            token, slot = (numbers == expert).nonzero(as_tuple=True)
            few = rows[token].reshape(*[1] * (states.ndim - 2), len(token), -1)
            made = self.rerun({
                self.states: few, self.chosen: chosen[token, slot][:, None], self.weights: weights[token, slot][:, None]
            })  # fmt: skip
            yield expert, token, made.reshape(len(token), -1)


def read_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], experts: int) -> Call | None:
    """Find tokens, experts and weights among the arguments of a call; None when they are not there."""
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs.items())
    tensors = {place: value for place, value in given.items() if isinstance(value, Tensor)}
    floats = {place: value for place, value in tensors.items() if value.is_floating_point()}
    whole = {place: value for place, value in tensors.items() if not value.is_floating_point()}
    for chosen, numbers in whole.items():
        if (numbers.ndim == 3 and numbers.shape[-1] != experts) or numbers.ndim not in (2, 3):
            continue
        weights = [place for place, value in floats.items() if value.shape == numbers.shape[:2]]
        states = [
            place for place, value in floats.items()
            if place not in weights[:1] and value.numel() // value.shape[-1] == len(numbers)
        ]  # fmt: skip
        if len(weights) >= 1 and len(states) == 1 and len(tensors) == 3:
            return Call(module, args, kwargs, states[0], chosen, weights[0])
    return None


def difference_of_sum(call: Call, experts: int) -> float:
    """How far what all experts add is from what the whole call gives, as a share of the largest number in it."""
    whole = call.rerun({}).float()
    whole = whole.reshape(-1, whole.shape[-1])
    made = torch.zeros_like(whole)
    for _, token, added in call.contributions(experts):
        made.index_add_(0, token, added.float())
    return float((whole - made).abs().max() / whole.abs().max().clamp_min(1e-30))


def watched(module: nn.Module, see: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Any:
    """Call ``see`` with the arguments of every call of a module, until the handle that is returned is removed."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch._C.DisableTorchFunction():
            see(args, kwargs)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@dataclass
class Use:
    """Sums over calibration tokens of what the experts of a block do. All are (experts,), float64, on the CPU."""

    experts: int
    tokens: Tensor = field(init=False)
    outputs: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = torch.zeros(self.experts, dtype=torch.float64)
        self.outputs = torch.zeros(self.experts, dtype=torch.float64)

    def add(self, call: Call, name: str) -> None:
        """Take one call in.

        Raises:
            CalibrationError: when an output is not finite.
        """
        for expert, token, added in call.contributions(self.experts):
            norm = float(added.float().norm(dim=-1).sum())
            if not norm < float("inf"):
                raise CalibrationError(
                    f"an activation is not finite at the output of expert {expert} of {name}",
                    hint="use other calibration data, or --compute-dtype float32",
                )
            self.tokens[expert] += len(token)
            self.outputs[expert] += norm


class WithoutExperts(TorchFunctionMode):
    """While active, products with these router weights (experts, in) never choose some experts."""

    def __init__(self, routers: Sequence[Tensor], gone: Tensor) -> None:
        super().__init__()
        self._places = {tensor.data_ptr() for tensor in routers}
        self._gone = gone

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        if getattr(func, "__name__", "") in PRODUCTS and any(
            isinstance(value, Tensor) and value.device.type != "meta" and value.data_ptr() in self._places
            for value in given
        ):
            result = result.index_fill(-1, self._gone.to(result.device), NEVER)
        return result

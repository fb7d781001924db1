"""Watches what a disturbance of one matrix's output does to the inputs of the others, in one run of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.blocks import Block, MatrixSpec

_ALL = torch.empty(0)
"""Stands for all rows at all tokens."""


@dataclass(frozen=True)
class SharedNorm:
    """A norm over the whole output of a matrix, without a bias: its module, its weight, and the matrix's tensors."""

    module: str
    weight: str
    fed_by: tuple[str, ...]
    centred: bool
    """Whether it subtracts the mean."""

    def renamed(self, name: Callable[[str], str]) -> SharedNorm:
        """The same in another block."""
        return SharedNorm(name(self.module), name(self.weight), tuple(map(name, self.fed_by)), self.centred)


class Observer:
    """Runs a block with the output of one matrix disturbed, and says what that does to the inputs of the others."""

    def __init__(self, block: Block, module: nn.Module, run: Callable[[], Any]) -> None:
        self._module, self._run, self._prefix = module, run, f"{block.name}."
        self.plain = {matrix.name: matrix for matrix in block.matrices if not matrix.experts}
        self._inputs = self._watch([], None)
        self.reached = [matrix for name, matrix in self.plain.items() if name in self._inputs]
        # Producer -> consumer -> whether a disturbance of all rows arrives at other tokens, too.
        self._spreads: dict[str, dict[str, bool]] = {}
        for producer in self.reached:
            now = self._watch([producer], torch.arange(producer.out_features))
            arrives = {c.name: _changes(self._inputs[c.name], now.get(c.name)) for c in self.reached if c != producer}
            self._spreads[producer.name] = {
                name: int(found[0].sum()) > 1 for name, found in arrives.items() if found and bool(found[1].any())
            }
        self.norms = self._norms()
        """Matrix -> the norm over its whole output."""
        self._bare: dict[str, Tensor] | None = None

    def reaching(self, consumer: MatrixSpec) -> list[MatrixSpec]:
        """The matrices whose output has some effect on a consumer's input."""
        return [matrix for matrix in self.reached if consumer.name in self._spreads[matrix.name]]

    def mixing(self, consumer: MatrixSpec) -> list[MatrixSpec]:
        """Those of them that have it at other tokens: keys and values, and all that comes before an attention."""
        return [matrix for matrix in self.reaching(consumer) if self._spreads[matrix.name][consumer.name]]

    def feed_all_of(self, producers: Sequence[MatrixSpec], consumer: MatrixSpec) -> bool:
        """Whether nothing of a consumer's input is left without them, and no other matrix has an effect around them.

        Else they are a gate on something else, such as what an attention gives.
        """
        before = self._inputs[consumer.name]
        left = self._watch(producers, None).get(consumer.name)
        if left is None or bool((left - left[:1]).abs().amax() > 1e-6 * before.abs().amax()):
            return False
        others = [matrix for matrix in self.reaching(consumer) if matrix not in producers]
        around = _changes(before, self._watch(others, _ALL, held=producers).get(consumer.name))
        return around is None or not bool(around[1].any())  # None where a router sent other tokens

    def changed(
        self, producer: MatrixSpec, rows: Tensor, consumer: MatrixSpec, *, past_norms: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Tokens and columns of the consumer's input that a disturbance of these rows, at one token, changes.

        Args:
            past_norms: as if `norms` were not there.

        Returns:
            Two bool tensors, or None when the consumer was not reached in the same way.
        """
        if not past_norms:
            return _changes(self._inputs[consumer.name], self._watch([producer], rows).get(consumer.name))
        with self._without_norms():
            if self._bare is None:
                self._bare = self._watch([], None)
            if consumer.name not in self._bare:
                return None
            return _changes(self._bare[consumer.name], self._watch([producer], rows).get(consumer.name))

    def _norms(self) -> dict[str, SharedNorm]:
        given: dict[str, Any] = {}
        found: dict[str, SharedNorm] = {}

        def see(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                given[name] = output

            return hook

        def compare(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                leaf, weight = next(iter(module.named_parameters()))
                for name, made in given.items():
                    if args and args[0] is made and made.shape[-1:] == weight.shape and _is_norm(module, made):
                        owner = f"{self._prefix}{path}"
                        centred = _same(module, made, made + made.abs().amax())
                        found[name] = SharedNorm(owner, f"{owner}.{leaf}", (name,), centred)

            return hook

        handles = [self._module_of(matrix).register_forward_hook(see(matrix.name)) for matrix in self.reached]
        for path, module in self._module.named_modules():
            if [parameter.ndim for parameter in module.parameters()] == [1]:
                handles.append(module.register_forward_hook(compare(path)))
        try:
            self._run()
        finally:
            for handle in handles:
                handle.remove()
        return found

    @contextmanager
    def _without_norms(self) -> Iterator[None]:
        """While it lasts, `norms` give what they get."""
        paths = {norm.module.removeprefix(self._prefix) for norm in self.norms.values()}
        handles = [
            self._module.get_submodule(path).register_forward_hook(lambda module, args, output: args[0])
            for path in paths
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _module_of(self, matrix: MatrixSpec) -> nn.Module:
        return self._module.get_submodule(matrix.module.removeprefix(self._prefix))

    def _outputs(self, matrices: Sequence[MatrixSpec]) -> dict[str, Tensor]:
        """What these matrices give in an undisturbed run."""
        outputs: dict[str, Tensor] = {}

        def see(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs[name] = output

            return hook

        handles = [self._module_of(matrix).register_forward_hook(see(matrix.name)) for matrix in matrices]
        try:
            self._run()
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _watch(
        self, producers: Sequence[MatrixSpec], rows: Tensor | None, held: Sequence[MatrixSpec] = ()
    ) -> dict[str, Tensor]:
        """Inputs of all matrices when some rows of these outputs are disturbed at one token; all are zero for None.

        Args:
            held: matrices whose outputs are those of an undisturbed run.
        """
        kept = self._outputs(held) if held else {}
        inputs: dict[str, Tensor] = {}
        handles = []

        def see(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor):
                    inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1]).clone()

            return hook

        def disturb(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):  # a router, for example, that gives more than its product
                return output
            if rows is None:
                return torch.zeros_like(output)
            if rows is _ALL:
                return output + 4 * output.abs().amax().clamp_min(1e-3)
            if int(rows.max()) >= output.shape[-1]:  # a module that groups its outputs: rows are no columns of these
                return output
            changed = output.clone(memory_format=torch.contiguous_format)
            flat = changed.view(-1, changed.shape[-1])
            # Larger than the output itself, so that it gets through an activation that is flat around zero.
            noise = 1 + torch.rand(len(rows), generator=torch.Generator().manual_seed(0))
            flat[len(flat) // 2, rows] += 4 * noise * output.abs().amax().clamp_min(1e-3)
            return changed

        def hold(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                same = name in kept and kept[name].shape == output.shape  # a router may send other tokens here now
                return kept[name] if same else output

            return hook

        for name, matrix in self.plain.items():
            handles.append(self._module_of(matrix).register_forward_pre_hook(see(name)))
        handles += [self._module_of(producer).register_forward_hook(disturb) for producer in producers]
        handles += [self._module_of(matrix).register_forward_hook(hold(matrix.name)) for matrix in held]
        try:
            self._run()
        finally:
            for handle in handles:
                handle.remove()
        return inputs


def _changes(before: Tensor, after: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if after is None or before.shape != after.shape:
        return None
    different = (before - after).abs() > 1e-6 * before.abs().amax().clamp_min(1e-30)
    return different.any(dim=1), different.any(dim=0)


def _is_norm(module: nn.Module, x: Tensor) -> bool:
    """Whether the output is the same for an input twice as large, up to an epsilon."""
    try:
        return _same(module, 1e3 * x, 2e3 * x)
    except Exception:  # noqa: BLE001 - any module may be asked, and may fail in any way: it is not looked through then
        return False


def _same(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    # Not called as a module: it is one of its hooks that asks.
    one, two = module.forward(x), module.forward(y)
    return bool((one - two).abs().max() <= 1e-4 * one.abs().max())

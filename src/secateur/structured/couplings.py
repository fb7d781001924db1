"""Which rows and columns of a block belong together, found by the flow of data, not by names of models.

A *unit* is what is removed as a whole: one neuron of a feed-forward network, or one key-value group of an attention
with all its query heads. It is a set of columns of one matrix, the *consumer* (down_proj, o_proj), and of the rows of
other matrices that feed these columns and nothing else. Whether they do is tried: the output of a candidate is
disturbed at one token, in the rows of some units only, and the consumer's input is watched.

- Neurons: the disturbance arrives at the same token, in the columns of these units only.
- Attention: it arrives in the columns of these units only, and for some candidate (keys, values) at other tokens too.

A block is run on random weights for this, so the result does not hang on a weight that happens to be zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.engine.blocks import Block, MatrixSpec
from secateur.structured.entries import entries_of

Kind = Literal["ffn", "kv-groups", "heads"]
_ALL = torch.empty(0)
"""Stands for all rows at all tokens."""


@dataclass(frozen=True)
class Cut:
    """One tensor from which slices go: ``indices`` (units, m) are those of each unit along ``dim``."""

    name: str
    dim: int
    indices: Tensor

    def keep(self, units: Tensor, size: int) -> Tensor:
        """Indices along ``dim`` that stay when only ``units`` stay, ascending.

        Args:
            units: numbers of the units that stay, (k,) int64.
            size: length of the tensor along ``dim``.
        """
        gone = torch.ones(len(self.indices), dtype=torch.bool)
        gone[units] = False
        stays = torch.ones(size, dtype=torch.bool)
        stays[self.indices[gone].reshape(-1)] = False
        return stays.nonzero().squeeze(1)

    def apply(self, tensor: Tensor, units: Tensor) -> Tensor:
        """The tensor without the slices of all other units; units (experts, k) are those of each expert."""
        if units.ndim == 2:
            inner = Cut(self.name, self.dim - 1, self.indices)
            return torch.stack([inner.apply(one, own) for one, own in zip(tensor, units, strict=True)])
        return tensor.index_select(self.dim, self.keep(units, tensor.shape[self.dim]).to(tensor.device))


@dataclass(frozen=True)
class Heads:
    """Query heads, key-value groups, and numbers in a head, by a model's config."""

    query: int
    groups: int
    size: int

    @property
    def each(self) -> int:
        """Query heads in a group."""
        return self.query // self.groups


@dataclass(frozen=True)
class Coupling:
    """All that belongs to the units of one consumer. ``columns`` (units, n) are its inputs, unit by unit."""

    kind: Kind
    consumer: str
    columns: Tensor
    cuts: tuple[Cut, ...]
    """Of the consumer itself, of the matrices that feed it, and of their biases."""
    parts: int = 1
    """As many units go from each of this many equal, consecutive parts: query heads, from each group."""
    heads: Heads | None = None
    """How the attention is built; None for neurons."""
    experts: int = 0
    """How many experts are stacked in the tensors, each with as many units, 0 for none."""
    group: str = ""
    """Couplings with one name here keep the same number of units; the kind where a model has one number for all."""

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.kind)

    @property
    def units(self) -> int:
        return len(self.columns)


def heads_of(config: Any, width: int) -> list[Heads]:
    """What the config allows an attention to be whose heads give ``width`` numbers; the likeliest first.

    Every number that a config calls heads may be that of the query heads or of the key-value groups.
    """
    numbers: list[int] = []
    groups: list[int] = [1] if getattr(config, "multi_query", False) else []
    common = getattr(config, "num_attention_heads", None)
    for key, value in [("num_attention_heads", common), *((path[-1], value) for path, value in entries_of(config))]:
        if "head" in key and not any(word in key for word in ("dim", "size", "ratio")):
            values = value if isinstance(value, list | tuple) else [value]
            (groups if "kv" in key or "key_value" in key else numbers).extend(
                one for one in values if type(one) is int and one >= 1
            )
    return [
        Heads(query, k, width // query)
        for query in dict.fromkeys(numbers) if query > 1 and width % query == 0
        for k in dict.fromkeys([*groups, query]) if query % k == 0
    ]  # fmt: skip


def find_couplings(
    block: Block, module: nn.Module, run: Callable[[], Any], tensors: Mapping[str, Tensor], config: Any
) -> list[Coupling]:
    """The couplings of one block.

    Args:
        module: the block, its weights in place.
        run: runs its forward on a short input, without gradients.
        tensors: all tensors of the block by full name.
        config: that of the block's part of the model.
    """
    observer = _Observer(block, module, run)
    found: list[Coupling] = []
    for consumer in observer.reached:
        neurons = _neurons(observer, consumer, tensors)
        if neurons is not None:
            found.append(neurons)
        elif observer.mixing(consumer):
            found += _attention(observer, consumer, tensors, config)
    return found + _of_siblings(found, [m for m in observer.plain.values() if m not in observer.reached], tensors)


def _of_siblings(
    found: Sequence[Coupling], unreached: Sequence[MatrixSpec], tensors: Mapping[str, Tensor]
) -> list[Coupling]:
    """Couplings of modules that no token of the short input came to, such as rare experts: as in one built alike.

    Alike are modules of one list, whose paths differ in one place and whose tensors have the same shapes.
    """
    made: dict[str, Coupling] = {}
    for coupling in found:
        for matrix in unreached:
            ours, theirs = coupling.consumer.split("."), matrix.name.split(".")
            places = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
            if len(ours) != len(theirs) or len(places) != 1 or matrix.name in made:
                continue
            old, new = (".".join(parts[: places[0] + 1]) + "." for parts in (ours, theirs))
            names = {cut.name: new + cut.name.removeprefix(old) for cut in coupling.cuts if cut.name.startswith(old)}
            if len(names) == len(coupling.cuts) and all(
                other in tensors and tensors[other].shape == tensors[name].shape for name, other in names.items()
            ):
                cuts = tuple(dataclasses.replace(cut, name=names[cut.name]) for cut in coupling.cuts)
                made[matrix.name] = dataclasses.replace(coupling, consumer=matrix.name, cuts=cuts)
    return list(made.values())


class _Observer:
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

    def changed(self, producer: MatrixSpec, rows: Tensor, consumer: MatrixSpec) -> tuple[Tensor, Tensor] | None:
        """Tokens and columns of the consumer's input that a disturbance of these rows, at one token, changes.

        Returns:
            Two bool tensors, or None when the consumer was not reached in the same way.
        """
        return _changes(self._inputs[consumer.name], self._watch([producer], rows).get(consumer.name))

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


def _neurons(observer: _Observer, consumer: MatrixSpec, tensors: Mapping[str, Tensor]) -> Coupling | None:
    """Units of one column each, fed by the rows of the same number, or of two halves, or of pairs side by side."""
    width = consumer.in_features
    number = torch.arange(width)
    layouts = {
        1: [number[:, None]],
        2: [torch.stack([number, width + number], dim=1), torch.stack([2 * number, 2 * number + 1], dim=1)],
    }
    columns = number[:, None]
    cuts: list[Cut] = []
    feeding: list[MatrixSpec] = []
    for producer in observer.reaching(consumer):
        for rows in layouts.get(producer.out_features // width, []) if producer.out_features % width == 0 else []:
            if _feeds(observer, producer, rows, consumer, columns, spreads=False) is not None:
                cuts += _cuts_of(producer, rows, tensors)
                feeding.append(producer)
                break
    if not cuts or not observer.feed_all_of(feeding, consumer):
        return None
    return Coupling("ffn", consumer.name, columns, (_consumer_cut(consumer, columns), *cuts))


def _attention(observer: _Observer, consumer: MatrixSpec, tensors: Mapping[str, Tensor], config: Any) -> list[Coupling]:
    """Units of the heads of one group, fed by its query, key and value rows in any of the usual orders.

    Where a group has several query heads these are units as well, for as many to go from each group.
    """
    for heads in heads_of(config, consumer.in_features):
        number = torch.arange(consumer.in_features)
        by_group, spread = _fed_by(observer, consumer, number.reshape(heads.groups, -1), heads, tensors, _group_rows)
        if not spread:
            continue
        if heads.groups == 1:
            by_group = []
        found = []
        if by_group:
            columns = number.reshape(heads.groups, -1)
            cuts = (_consumer_cut(consumer, columns), *by_group)
            found.append(Coupling("kv-groups", consumer.name, columns, cuts, heads=heads))
        if heads.each > 1:
            columns = number.reshape(heads.query, -1)
            by_head, _ = _fed_by(observer, consumer, columns, heads, tensors, _head_rows)
            if by_head:
                cuts = (_consumer_cut(consumer, columns), *by_head)
                found.append(Coupling("heads", consumer.name, columns, cuts, parts=heads.groups, heads=heads))
        if found:
            return found
    return []


def _fed_by(
    observer: _Observer, consumer: MatrixSpec, columns: Tensor, heads: Heads, tensors: Mapping[str, Tensor],
    layouts: Callable[[int, Heads], Iterator[Tensor]],
) -> tuple[list[Cut], bool]:  # fmt: skip
    """The rows that feed the units of an attention, and whether any of them reaches other tokens."""
    cuts: list[Cut] = []
    spread = False
    for producer in observer.reaching(consumer):
        for rows in layouts(producer.out_features, heads):
            fed = _feeds(observer, producer, rows, consumer, columns, spreads=True)
            if fed is not None:
                spread |= fed
                cuts += _cuts_of(producer, rows, tensors)
                break
    return cuts, spread


def _group_rows(out_features: int, heads: Heads) -> Iterator[Tensor]:
    """Rows of each group, (groups, rows): queries, keys or values, all three one after the other, or group by group."""
    k, d, each = heads.groups, heads.size, heads.each
    number = torch.arange(out_features)
    if out_features % k == 0:  # also with a gate beside every query, or values of another size
        yield number.reshape(k, -1)
    if out_features == (each + 2) * k * d:
        query, key, value = number.split([heads.query * d, k * d, k * d])
        yield torch.cat([query.reshape(k, -1), key.reshape(k, d), value.reshape(k, d)], dim=1)


def _head_rows(out_features: int, heads: Heads) -> Iterator[Tensor]:
    """Rows of each query head, (heads, rows), in the same orders; keys and values stay."""
    k, d, each = heads.groups, heads.size, heads.each
    number = torch.arange(out_features)
    if out_features % heads.query == 0:
        yield number.reshape(heads.query, -1)
    if out_features == (heads.query + 2 * k) * d:
        yield number[: heads.query * d].reshape(heads.query, d)
        yield number.reshape(k, each + 2, d)[:, :each].reshape(heads.query, d)


def _feeds(
    observer: _Observer, producer: MatrixSpec, rows: Tensor, consumer: MatrixSpec, columns: Tensor, *, spreads: bool
) -> bool | None:
    """Whether disturbed rows of some units arrive in the columns of these units only: None when they do not.

    Returns:
        Whether other tokens see the disturbance as well. With ``spreads`` unset that counts as None, too.
    """
    units = len(rows)
    some = torch.arange(units) % 3 == 1 if units > 2 else torch.arange(units) == units - 1
    found = observer.changed(producer, rows[some].reshape(-1), consumer)
    if found is None:
        return None
    tokens, touched = found
    own = torch.zeros(consumer.in_features, dtype=torch.bool)
    own[columns[some].reshape(-1)] = True
    if not bool(touched.any()) or bool((touched & ~own).any()):
        return None
    others = int(tokens.sum()) > 1
    return None if others and not spreads else others


def _consumer_cut(consumer: MatrixSpec, columns: Tensor) -> Cut:
    return Cut(consumer.name, 0 if consumer.transposed else 1, columns)


def _cuts_of(producer: MatrixSpec, rows: Tensor, tensors: Mapping[str, Tensor]) -> Sequence[Cut]:
    """The rows of a matrix and of its bias."""
    cuts = [Cut(producer.name, 1 if producer.transposed else 0, rows)]
    bias = f"{producer.module}.bias"
    if bias in tensors:
        cuts.append(Cut(bias, 0, rows))
    return cuts

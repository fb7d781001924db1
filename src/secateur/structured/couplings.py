"""Which rows and columns of a block belong together, found by the flow of data, not by names of models.

A *unit* is what is removed as a whole: one neuron of a feed-forward network, or one key-value group of an attention
with all its query heads. It is a set of columns of one matrix, the *consumer* (down_proj, o_proj), and of the rows of
other matrices that feed these columns and nothing else. Whether they do is tried: the output of a candidate is
disturbed at one token, in the rows of some units only, and the consumer's input is watched.

- Neurons: the disturbance arrives at the same token, in the columns of these units only.
- Attention: it arrives in the columns of these units only, and for some candidate (keys, values) at other tokens too.
  A norm over the whole output of a candidate (queries or keys of all heads) would carry it to all columns; it is looked
  through then, and loses the entries of the units as well. Its weight stays what it is: heads are taken to be alike.

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
from secateur.engine.entries import entries_of
from secateur.structured.observer import Observer, SharedNorm

Kind = Literal["ffn", "kv-groups", "heads"]


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
    """Of the consumer itself, of the matrices that feed it, of their biases, and of norms over them."""
    parts: int = 1
    """As many units go from each of this many equal, consecutive parts: query heads, from each group."""
    heads: Heads | None = None
    """How the attention is built; None for neurons."""
    experts: int = 0
    """How many experts are stacked in the tensors, each with as many units, 0 for none."""
    norms: tuple[SharedNorm, ...] = ()
    """Norms over all units."""
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
    observer = Observer(block, module, run)
    found: list[Coupling] = []
    for consumer in observer.reached:
        neurons = neurons_of(observer, consumer, tensors)
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
            if (
                not coupling.norms
                and len(names) == len(coupling.cuts)
                and all(
                    other in tensors and tensors[other].shape == tensors[name].shape for name, other in names.items()
                )
            ):
                cuts = tuple(dataclasses.replace(cut, name=names[cut.name]) for cut in coupling.cuts)
                made[matrix.name] = dataclasses.replace(coupling, consumer=matrix.name, cuts=cuts)
    return list(made.values())


def neurons_of(observer: Observer, consumer: MatrixSpec, tensors: Mapping[str, Tensor]) -> Coupling | None:
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
            if feeds(observer, producer, rows, consumer, columns, spreads=False) is not None:
                cuts += cuts_of(producer, rows, tensors)
                feeding.append(producer)
                break
    if not cuts or not observer.feed_all_of(feeding, consumer):
        return None
    return Coupling("ffn", consumer.name, columns, (consumer_cut(consumer, columns), *cuts))


def _attention(observer: Observer, consumer: MatrixSpec, tensors: Mapping[str, Tensor], config: Any) -> list[Coupling]:
    """Units of the heads of one group, fed by its query, key and value rows in any of the usual orders.

    Where a group has several query heads these are units as well, for as many to go from each group.
    """
    for heads in heads_of(config, consumer.in_features):
        number = torch.arange(consumer.in_features)
        columns = number.reshape(heads.groups, -1)
        by_group, norms, spread, parts = _fed_by(observer, consumer, columns, heads, tensors, _group_rows)
        if not spread:
            continue
        found = []
        if by_group and heads.groups > 1:
            cuts = (consumer_cut(consumer, columns), *by_group)
            found.append(Coupling("kv-groups", consumer.name, columns, cuts, parts, heads, norms=norms))
        if heads.each > 1:
            columns = number.reshape(heads.query, -1)
            by_head, norms, _, _ = _fed_by(observer, consumer, columns, heads, tensors, _head_rows)
            if by_head:
                cuts = (consumer_cut(consumer, columns), *by_head)
                found.append(Coupling("heads", consumer.name, columns, cuts, heads.groups, heads, norms=norms))
        if found:
            return found
    return []


def _fed_by(
    observer: Observer, consumer: MatrixSpec, columns: Tensor, heads: Heads, tensors: Mapping[str, Tensor],
    layouts: Callable[[int, Heads], Iterator[tuple[Tensor, int]]],
) -> tuple[list[Cut], tuple[SharedNorm, ...], bool, int]:  # fmt: skip
    """What feeds the units of an attention.

    Returns:
        The rows, norms over them, whether any of them reaches other tokens, and the parts they are stored in.
    """
    cuts: list[Cut] = []
    norms: list[SharedNorm] = []
    spread, most = False, 1
    for producer in observer.reaching(consumer):
        for rows, parts in layouts(producer.out_features, heads):
            fed = feeds(observer, producer, rows, consumer, columns, spreads=True)
            norm = observer.norms.get(producer.name) if fed is None else None
            if norm is not None:
                fed = feeds(observer, producer, rows, consumer, columns, spreads=True, past_norms=True)
            if fed is not None:
                spread, most = spread | fed, max(most, parts)
                own = cuts_of(producer, rows, tensors)
                cuts += own
                if norm is not None:
                    cuts.append(Cut(norm.weight, 0, rows))
                    norms.append(dataclasses.replace(norm, fed_by=tuple(cut.name for cut in own)))
                break
    return cuts, tuple(norms), spread, most


def _group_rows(out_features: int, heads: Heads) -> Iterator[tuple[Tensor, int]]:
    """Rows of each group, (groups, rows), and how many parts they are stored in, of which each keeps as many.

    Queries, keys or values, all three one after the other, or group by group; or in parts, each with all three.
    """
    k, d, each = heads.groups, heads.size, heads.each
    number = torch.arange(out_features)
    if out_features % k == 0:  # also with a gate beside every query, or values of another size
        yield number.reshape(k, -1), 1
    if out_features == (each + 2) * k * d:
        query, key, value = number.split([heads.query * d, k * d, k * d])
        yield torch.cat([query.reshape(k, -1), key.reshape(k, d), value.reshape(k, d)], dim=1), 1
        for parts in (2, 4, 8):
            if each == 1 and k % parts == 0 and k > parts:
                yield number.reshape(parts, 3, k // parts, d).transpose(1, 2).reshape(k, 3 * d), parts


def _head_rows(out_features: int, heads: Heads) -> Iterator[tuple[Tensor, int]]:
    """Rows of each query head, (heads, rows), in the same orders; keys and values stay."""
    k, d, each = heads.groups, heads.size, heads.each
    number = torch.arange(out_features)
    if out_features % heads.query == 0:
        yield number.reshape(heads.query, -1), 1
    if out_features == (heads.query + 2 * k) * d:
        yield number[: heads.query * d].reshape(heads.query, d), 1
        yield number.reshape(k, each + 2, d)[:, :each].reshape(heads.query, d), 1


def feeds(
    observer: Observer, producer: MatrixSpec, rows: Tensor, consumer: MatrixSpec, columns: Tensor, *, spreads: bool,
    past_norms: bool = False,
) -> bool | None:  # fmt: skip
    """Whether disturbed rows of some units arrive in the columns of these units only: None when they do not.

    Args:
        past_norms: look through norms over the whole output of a matrix.

    Returns:
        Whether other tokens see the disturbance as well. With ``spreads`` unset that counts as None, too.
    """
    units = len(rows)
    some = torch.arange(units) % 3 == 1 if units > 2 else torch.arange(units) == units - 1
    found = observer.changed(producer, rows[some].reshape(-1), consumer, past_norms=past_norms)
    if found is None:
        return None
    tokens, touched = found
    own = torch.zeros(consumer.in_features, dtype=torch.bool)
    own[columns[some].reshape(-1)] = True
    if not bool(touched.any()) or bool((touched & ~own).any()):
        return None
    others = int(tokens.sum()) > 1
    return None if others and not spreads else others


def consumer_cut(consumer: MatrixSpec, columns: Tensor) -> Cut:
    """The columns of a matrix."""
    return Cut(consumer.name, 0 if consumer.transposed else 1, columns)


def cuts_of(producer: MatrixSpec, rows: Tensor, tensors: Mapping[str, Tensor]) -> Sequence[Cut]:
    """The rows of a matrix and of its bias."""
    cuts = [Cut(producer.name, 1 if producer.transposed else 0, rows)]
    bias = f"{producer.module}.bias"
    if bias in tensors:
        cuts.append(Cut(bias, 0, rows))
    return cuts

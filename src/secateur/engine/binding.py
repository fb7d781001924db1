"""Which keys of a checkpoint make which tensors of a model, both ways.

transformers may rename keys while it loads (old names, added prefixes) and may convert tensors (one file entry per
expert becomes one fused 3-D tensor). Pruning sees the tensors of the model; the result is written under the keys,
shapes and formats of the source, so that whatever read the source reads the result.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from secateur.engine.skeleton import computed_constants, tied_names
from secateur.errors import CheckpointError, UnsupportedModelError


class TensorReader(Protocol):
    """The part of a checkpoint reader that loading needs."""

    def tensor(self, key: str) -> torch.Tensor: ...


@dataclass
class Unit:
    """Checkpoint keys that are converted together into one or more tensors of the model."""

    names: list[str]
    keys: list[str]
    converter: WeightConverter | None = None
    patterns: list[str] = field(default_factory=list)
    """For each key, the source pattern of the converter that matched it."""
    renamed: list[str] = field(default_factory=list)
    """For each key, its name after renaming and before conversion."""


class Binding:
    """The units of one model and one checkpoint.

    ``unbound`` keys belong to no tensor of the model; ``missing`` parameters of the model are not in the checkpoint.
    """

    def __init__(self, model: transformers.PreTrainedModel, keys: Iterable[str]) -> None:
        self._model = model
        self.resident = False
        """Whether weights outside the blocks are loaded at the start of a run and stay: `rehearse` finds out."""
        self.units: list[Unit] = []
        self.unbound: list[str] = []
        self._by_name: dict[str, Unit] = {}
        state = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = model.base_model_prefix
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:  # already in the model's own naming
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name not in state:
                self.unbound.append(key)
                continue
            unit = self._by_name.get(name)
            if unit is None:
                unit = Unit([name], [])
                if pattern is not None:
                    unit.converter = by_pattern[pattern]
                    targets = unit.converter.target_patterns
                    unit.names = [name.replace(targets[0], target) for target in targets]
                self.units.append(unit)
                self._by_name.update(dict.fromkeys(unit.names, unit))
            elif unit.converter is None:
                raise CheckpointError(f"two weights, '{unit.keys[0]}' and '{key}', both belong to {name}")
            unit.keys.append(key)
            unit.patterns.append(pattern or key)
            unit.renamed.append(apply_renamings(key, renamings))
        self._alias_tied(state)
        buffers = {name for name, _ in model.named_buffers()}
        self.missing = [name for name in state if name not in self._by_name and name not in buffers]
        if self.missing:
            computed = computed_constants(model)
            self.missing = [name for name in self.missing if name not in computed]

    def _alias_tied(self, state: dict[str, torch.Tensor]) -> None:
        ties = tied_names(self._model)
        for name, source in {**ties, **{source: name for name, source in ties.items()}}.items():
            if name not in self._by_name and source in self._by_name and name in state:
                self._by_name[name] = self._by_name[source]
        for name, source in ties.items():  # several names tied to one that is itself only an alias
            if name not in self._by_name:
                for other, root in ties.items():
                    if root == source and other in self._by_name:
                        self._by_name[name] = self._by_name[other]
                        break

    def bound(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return name in self._by_name

    def unit_of(self, name: str) -> Unit:
        """The unit that makes a tensor.

        Raises:
            CheckpointError: when the checkpoint lacks it.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise CheckpointError(
                f"the checkpoint has no weights for {name}",
                hint="the folder is incomplete, or its config names another architecture",
            ) from None

    def keys_of(self, names: Iterable[str]) -> list[str]:
        """Checkpoint keys that make these tensors of the model; names that the checkpoint lacks are left out."""
        return sorted({key for name in names if name in self._by_name for key in self._by_name[name].keys})

    def load(self, names: Sequence[str], reader: TensorReader) -> dict[str, torch.Tensor]:
        """Tensors of the model by name, in the dtype of the checkpoint.

        Raises:
            CheckpointError: when the checkpoint lacks one, or its shape is not the model's.
        """
        loaded: dict[str, torch.Tensor] = {}
        for name in names:
            if name in loaded:
                continue
            unit = self.unit_of(name)
            made = self.convert(unit, reader)
            if name in made:
                loaded.update({n: t for n, t in made.items() if n in names})
            else:  # a tied alias
                loaded[name] = next(iter(made.values()))
        expected = self._model.state_dict()
        for name, tensor in loaded.items():
            if expected[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{name} is {tuple(tensor.shape)} in the checkpoint, {tuple(expected[name].shape)} by the config",
                    hint="config.json does not belong to these weights",
                )
        return loaded

    def convert(self, unit: Unit, reader: TensorReader) -> dict[str, torch.Tensor]:
        """The tensors that the entries of one unit make, whatever their shapes."""
        if unit.converter is None:
            return {unit.names[0]: reader.tensor(unit.keys[0])}
        converter = copy.deepcopy(unit.converter)
        for key, pattern in zip(unit.keys, unit.patterns, strict=True):
            converter.add_tensor(unit.names[0], key, pattern, reader.tensor(key))
        made = converter.convert(unit.names[0], model=self._model, config=self._model.config)
        return {name: _single(tensor) for name, tensor in made.items()}

    def unload(self, unit: Unit, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint entries that make these tensors: the inverse of `load` for one whole unit.

        Raises:
            UnsupportedModelError: when the conversion cannot be undone.
        """
        if unit.converter is None:
            return {unit.keys[0]: tensors[unit.names[0]]}
        reverse: Any = unit.converter.reverse_transform()
        for name in unit.names:
            first, pattern = reverse.rename_source_key(name)
            reverse.add_tensor(first, name, pattern, tensors[name])
        made = reverse.convert(first, model=self._model, config=self._model.config)
        entries = {}
        for name, tensor in made.items():
            entries[_key_of(unit, name)] = _single(tensor).contiguous()
        if set(entries) != set(unit.keys):
            raise UnsupportedModelError(f"the conversion that makes {unit.names[0]} cannot be undone")
        return entries


def _single(tensor: Any) -> torch.Tensor:
    while isinstance(tensor, list):
        tensor = tensor[0]
    return tensor  # type: ignore[no-any-return]


def _key_of(unit: Unit, name: str) -> str:
    """The checkpoint key of an entry that an undone conversion names: equal, or equal but for a model prefix."""
    for renamed, key in zip(unit.renamed, unit.keys, strict=True):
        if renamed == name or name.endswith("." + renamed) or renamed.endswith("." + name):
            return key
    raise UnsupportedModelError(f"the conversion that makes {unit.names[0]} cannot be undone: no key for {name}")

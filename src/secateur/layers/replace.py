"""Puts the layers of a converted model in the place of those of its architecture."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import CheckpointError
from secateur.layers.spec import WHOLE, Spec, is_converted, read_spec
from secateur.layers.step import scale_steps


def replace_layers(model: nn.Module, spec: Spec) -> None:
    """Replace modules, without weights where the model has none, and tie what is tied.

    Raises:
        CheckpointError: when the model has no such module, or it is no linear layer.
    """
    for path, entry in spec.modules.items():
        try:
            old = model.get_submodule(path)
        except AttributeError:
            raise CheckpointError(
                f"config.json names a converted layer {path}, which the model has not", hint="convert the model again"
            ) from None
        if entry["kind"] not in WHOLE and not isinstance(old, nn.Linear | Conv1D):
            raise CheckpointError(f"{path} is no linear layer, but converted", hint="convert the model again")
        try:
            layer = importlib.import_module(f"secateur.layers.{entry['kind']}").build(old, entry)
        except AttributeError as error:  # parts that the module has not
            raise CheckpointError(
                f"config.json names parts of {path} that it has not: {error}", hint="convert the model again"
            ) from None
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.train(old.training))
    if spec.sharing is not None and spec.sharing.step != 1:
        scale_steps(model, spec.sharing)
    ties: Any = getattr(model, "all_tied_weights_keys", None)
    for target, source in spec.tied.items():
        owner, _, leaf = target.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(source)
        if ties is not None:
            ties[target] = source
    if spec.tied and ties is not None:  # so that `save_pretrained` leaves the aliases out
        own: Any = model
        own._tied_weights_keys = {**(own._tied_weights_keys or {}), **spec.tied}
        if any(isinstance(module, Conv1D) for module in model.modules()):
            own._adjust_bias = _leave_bias


def _leave_bias(*modules: Any) -> None:
    """In the place of what transformers does after tying a weight: it cuts a bias to the rows of the weight, which for
    matrices that are stored the other way round are the inputs.
    """


def replace_by_config(model: nn.Module) -> None:
    """The same for a model that was made from the config of a converted folder; others stay as they are."""
    config: Any = model.config
    entries = config.to_dict()
    if is_converted(entries):
        replace_layers(model, read_spec(entries))


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    out_features, in_features = weight.shape[::-1] if isinstance(layer, Conv1D) else weight.shape
    return out_features, in_features

"""What the config of a converted model says of its layers: read, checked, written. No torch.

``config.json`` of such a folder has the model type ``secateur``; the type of the architecture and the layers are
beside it:

    "model_type": "secateur",
    "secateur_model_type": "llama",
    "quantization_config": {
        "quant_method": "secateur-layers",
        "version": 1,
        "conversion": "factorized",
        "modules": {"model.layers.0.self_attn.q_proj": {"kind": "low_rank", "rank": 64}, ...},
        "tied": {"model.layers.1.self_attn.q_proj.cores.2": "model.layers.0.self_attn.q_proj.cores.2", ...}
    }

The name of the entry is the one under which transformers lets other packages replace layers before weights are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.errors import CheckpointError

NAME = "secateur"
"""The model type of a converted folder."""
METHOD = "secateur-layers"
"""The name of its method in ``quantization_config``; the sparse format has another."""
MODEL_TYPE = "secateur_model_type"
ENTRY = "quantization_config"
VERSION = 1
KINDS = {"low_rank": ("rank",), "tensor_train": ("inputs", "outputs", "ranks"),
         "fused": ("models", "rank", "router_rank", "top"), "moe": ("experts", "top"),
         "adapter_moe": ("experts", "top", "dim", "width")}  # fmt: skip
"""Kind of a layer, which is the name of its file here -> sizes that its entry must say beside ``kind``."""
NAMES = {"moe": ("up", "down", "act", "gate", "router")}
"""Kind -> names that its entry must say; one may be empty."""
ROUTERS = ("mlp", "similarity", "oracle")
WHOLE = ("moe", "adapter_moe")
"""Kinds that take the place of a module that holds linear layers, not of one linear layer."""


@dataclass(frozen=True)
class Sharing:
    """Which blocks of a model use the same weights, and how large a step each makes."""

    row: str
    """Path of the list of blocks."""
    groups: list[int]
    """Number of the group of each block."""
    step: float = 1.0
    """A block gives h + step (block(h) - h)."""


@dataclass
class Spec:
    """The layers of a converted model."""

    conversion: str
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path of a module -> ``kind`` and sizes of the layer that takes its place."""
    tied: dict[str, str] = field(default_factory=dict)
    """Parameter -> the parameter whose tensor it is; only the latter is in the file."""
    sharing: Sharing | None = None
    """Of a model whose blocks are tied as a whole."""

    def to_entry(self) -> dict[str, Any]:
        """The entry of the config."""
        entry = {"quant_method": METHOD, "version": VERSION, "conversion": self.conversion, "modules": self.modules,
                 "tied": self.tied}  # fmt: skip
        return entry if self.sharing is None else {**entry, "sharing": asdict(self.sharing)}


def is_converted(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, or the dictionary of a config, is one of a converted model."""
    entry = config.get(ENTRY)
    return isinstance(entry, Mapping) and entry.get("quant_method") == METHOD


def read_spec(config: Mapping[str, Any]) -> Spec:
    """The layers that a config names, each checked to be one that can be built.

    Raises:
        CheckpointError: when it names what is not known, or something is missing.
    """
    entry = config[ENTRY]
    if entry.get("version") != VERSION:
        raise CheckpointError(
            f"the model was converted in version {entry.get('version')} of the format, this one reads {VERSION}",
            hint="use another version of secateur, or convert the model again",
        )
    modules, tied = entry.get("modules"), entry.get("tied", {})
    if not isinstance(modules, Mapping) or not isinstance(tied, Mapping):
        raise _damaged("has no table of its layers")
    for path, layer in modules.items():
        kind = layer.get("kind") if isinstance(layer, Mapping) else None
        if kind not in KINDS:
            raise _damaged(f"says nothing known of {path}: {str(layer)[:60]}")
        for name in KINDS[kind]:
            if not _sizes(layer.get(name)):
                raise _damaged(f"gives {layer.get(name)!r} as {name} of {path}")
        if kind in WHOLE and not _among(layer["top"], layer["experts"]):
            raise _damaged(f"takes {layer['top']} of {layer['experts']} experts in {path}")
        for name in NAMES.get(kind, ()):
            if not isinstance(layer.get(name), str) or (name == "router" and layer[name] not in ROUTERS):
                raise _damaged(f"gives {layer.get(name)!r} as {name} of {path}")
    if not all(isinstance(name, str) for pair in tied.items() for name in pair):
        raise _damaged("ties what are no names")
    return Spec(
        str(entry.get("conversion")), {path: dict(layer) for path, layer in modules.items()}, dict(tied),
        _sharing(entry.get("sharing")),
    )  # fmt: skip


def _sharing(data: Any) -> Sharing | None:
    if data is None:
        return None
    found: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
    row, groups, step = (found.get(name) for name in ("row", "groups", "step"))
    if not isinstance(step, int | float) or isinstance(step, bool) or not (step > 0 and math.isfinite(step)):
        raise _damaged(f"gives {step!r} as the step of its blocks")
    if not isinstance(row, str) or not isinstance(groups, list) or not _sizes(groups):
        raise _damaged(f"says nothing known of the blocks that share: {str(data)[:60]}")
    return Sharing(row, list(groups), float(step))


def converted_config(config: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """A config.json with the layers of a conversion."""
    return {**config, "model_type": NAME, MODEL_TYPE: config["model_type"], ENTRY: spec.to_entry()}


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the model type of the architecture again, as its config class reads it; the layers stay.

    Raises:
        CheckpointError: when it does not say which type that is.
    """
    if config.get("model_type") != NAME:
        return dict(config)
    if not isinstance(config.get(MODEL_TYPE), str) or not is_converted(config):
        raise _damaged(f"lacks {MODEL_TYPE} or {ENTRY}")
    return {key: value for key, value in config.items() if key != MODEL_TYPE} | {"model_type": config[MODEL_TYPE]}


def _among(some: Any, every: Any) -> bool:
    return isinstance(some, int) and isinstance(every, int) and 1 <= some <= every


def _sizes(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return bool(values) and all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in values)


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"config.json of a converted model {what}", hint="convert the model again")

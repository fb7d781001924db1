"""The plug-in by which transformers loads the sparse format. Importing it registers it; `hook` says when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.checkpoint.reader import read_header
from secateur.errors import CheckpointError, UnsafeCheckpointError, UnsupportedModelError
from secateur.packing.header import METHOD, Header, check_places
from secateur.runtime.blocks import speed_up
from secateur.runtime.decoder import take_single_tokens
from secateur.runtime.kernels import find
from secateur.runtime.modules import Packed, TiedEmbedding, TiedLinear, packed_for
from secateur.runtime.siblings import introduce

logger = logging.get_logger(__name__)


class SparseConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed model. Making one checks it.

    Raises:
        UnsupportedModelError: for a version that is not known.
        CheckpointError: when it makes no sense.
    """

    def __init__(self, **data: Any) -> None:
        self.quant_method = METHOD
        self.header = Header.from_dict({"quant_method": METHOD, **data})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        made = cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        return self.header.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class SparseQuantizer(HfQuantizer):
    """Puts packed modules in the places of plain ones before weights are loaded, and checks them afterwards."""

    requires_calibration = True  # a model is packed by `secateur export`, never while it is loaded

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        header: Header = self.quantization_config.header
        if checkpoint_files is not None:
            _check_files(header, checkpoint_files)
        dtype = dtype or torch.get_default_dtype()
        for name, entry in header.matrices.items():
            place = _place_of(model, name)
            if place is None:
                if type(model).__name__ in (model.config.architectures or ()):
                    raise CheckpointError(
                        f"the header packs {name}, which the model has not",
                        hint="config.json does not belong to these weights",
                    )
                continue  # such as the head, when the model is opened without one
            parent, leaf = place
            old = getattr(parent, leaf)
            made = packed_for(old, entry, dtype, name)
            setattr(parent, leaf, made.train(old.training))
        _tie(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, Packed):
                module.check(name)
        introduce(model)
        speed_up(model)
        take_single_tokens(model)
        if reason := find().reason:
            logger.warning_once(
                "The sparse weights of this model are unpacked by PyTorch each time they are used: it computes what "
                f"the dense model computes, in less memory, but slowly ({reason})."
            )
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        raise UnsupportedModelError(
            "a packed model is not unpacked in memory", hint="secateur export FOLDER --format hf -o OUT unpacks it"
        )


def _check_files(header: Header, files: Sequence[str]) -> None:
    """The headers of the files against that of the format, before a tensor is read."""
    stored: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise UnsafeCheckpointError(f"{file} is not a safetensors file", hint="the sparse format has no other")
        for info in read_header(file, file.name)[0]:
            if info.key in stored:
                raise CheckpointError(f"tensor {info.key} is in {file} and in another file")
            stored[info.key] = info.dtype, info.shape, info.offset
    check_places(header, stored, Path(files[0]).parent if files else "the checkpoint")


def _place_of(model: Any, name: str) -> tuple[nn.Module, str] | None:
    """The module that has a module, and its name there; a model without a head lacks the prefix, or the head."""
    prefix = f"{model.base_model_prefix}."
    for known in (name, name.removeprefix(prefix), prefix + name):
        parent, _, leaf = known.rpartition(".")
        try:
            owner: nn.Module = model.get_submodule(parent)
        except AttributeError:
            continue
        if isinstance(owner._modules.get(leaf), nn.Module):
            return owner, leaf
    return None


def _tie(model: Any) -> None:
    """Modules whose weight is tied to a packed one use that; transformers need not tie them any more."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    gone = set()
    for target, source in ties.items():
        owner = model.get_submodule(source.rpartition(".")[0]) if source.endswith(".weight") else None
        if not isinstance(owner, Packed):
            continue
        parent, _, leaf = target.removesuffix(".weight").rpartition(".")
        place = model.get_submodule(parent)
        old = getattr(place, leaf)
        if isinstance(old, nn.Linear):
            setattr(place, leaf, TiedLinear(owner, old.bias).train(old.training))
        elif isinstance(old, nn.Embedding):
            setattr(place, leaf, TiedEmbedding(owner).train(old.training))
        else:
            raise CheckpointError(f"{target} is tied to the packed {source}, and is in a {type(old).__name__}")
        gone.add(target)
    if gone:
        model.all_tied_weights_keys = {target: source for target, source in ties.items() if target not in gone}
        for part in model.modules():
            own = getattr(part, "_tied_weights_keys", None)
            if isinstance(own, dict) and not isinstance(part, Packed):
                part._tied_weights_keys = {
                    target: source
                    for target, source in own.items()
                    if not any(name == target or name.endswith(f".{target}") for name in gone)
                }


if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantization_config(METHOD)(SparseConfig)
    auto.register_quantizer(METHOD)(SparseQuantizer)

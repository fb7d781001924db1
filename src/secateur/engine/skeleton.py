"""A model without weights: every module in its place, parameters on the meta device, buffers real."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.initialization import no_init_weights

from secateur.errors import UnsupportedModelError
from secateur.layers.replace import replace_by_config


def build_skeleton(folder: Path) -> transformers.PreTrainedModel:
    """The stock class that the config names, in eval mode, without weights.

    Parameters lie on the meta device and take no memory; buffers that the code computes (rotary frequencies, position
    ids) are real, because no checkpoint holds them.

    Raises:
        UnsupportedModelError: when the installed transformers has no such class.
    """
    return skeleton_of(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))


def skeleton_of(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """The same for a config in memory.

    Raises:
        UnsupportedModelError: when the installed transformers has no such class.
    """
    cls = model_class(config)
    # float32 whatever the config says: buffers that the code computes must not be rounded to a narrower format.
    # No weight is initialised either: it would take most of the time, for numbers that nobody sees.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: transformers.PreTrainedModel = cls._from_config(config, dtype=torch.float32)
        replace_by_config(model)
    model.tie_weights(recompute_mapping=False)
    for name, tensor in computed_constants(model).items():
        set_tensor(model, name, tensor)
    # Nothing is generated here, and a KV cache would only hold memory; experts must run one by one to be observed.
    for part in {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values():
        if getattr(part, "use_cache", False):
            part.use_cache = False
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"
    return model.eval()


def computed_constants(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters that a class says no file need hold and computes itself, such as sinusoids that are never trained.

    Only those that it computes to the same numbers each time: others are weights that are missing.
    """
    patterns = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if not any(re.search(pattern, name) for pattern in patterns) or name in tied_names(model):
            continue
        owner, _, leaf = name.rpartition(".")
        made = []
        for seed in (0, 1):
            module = copy.deepcopy(model.get_submodule(owner)).to_empty(device="cpu")
            for tensor in module.parameters(recurse=False):
                tensor.data.fill_(torch.nan)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model._init_weights(module)
            made.append(getattr(module, leaf).detach())
        if made[0].shape == parameter.shape and torch.equal(*made):  # NaN where it was not made equals nothing
            found[name] = made[0]
    return found


def model_class(config: transformers.PreTrainedConfig) -> type[transformers.PreTrainedModel]:
    """The class named by ``architectures``, or the causal-LM or base class of the model type.

    Raises:
        UnsupportedModelError: when there is none.
    """
    for name in config.architectures or []:
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls  # type: ignore[no-any-return]
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} has no model class for '{config.model_type}' "
        f"(architectures: {config.architectures})",
        hint="upgrade transformers, or give config.json an 'architectures' entry of a known class",
    )


def tied_names(model: transformers.PreTrainedModel) -> dict[str, str]:
    """Parameter name -> the name whose tensor it shares (an output head tied to its embedding, for example)."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tensors_of(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a module and all below it, by full name."""
    dot = f"{prefix}." if prefix else ""
    return {dot + name: tensor for name, tensor in module.state_dict(keep_vars=True).items()}


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, whatever its dtype or device was."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def drop_tensor(model: nn.Module, name: str) -> None:
    """Put the meta tensor back, so that the memory is free."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old: torch.Tensor | None = module._parameters.get(leaf)
    if old is None:
        old = module._buffers[leaf]
    assert old is not None
    set_tensor(model, name, torch.empty_like(old, device="meta"))


def buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that are really there (rotary frequencies, position ids) to a device."""
    for name, buffer in real_buffers(model).items():
        set_tensor(model, name, buffer.to(device))


def real_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are really there, by name."""
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if not buffer.is_meta}


def declare_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the absent parameters a number format: some models cast their inputs to that of a weight not yet loaded."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta" and parameter.dtype != dtype:
                empty = torch.empty_like(parameter, dtype=dtype, device="meta")
                module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

"""Open a model folder whole, by the stock class its config names, to run it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from secateur.engine.device import parse_dtype, resolve_device
from secateur.engine.quiet import quiet_loading
from secateur.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from secateur.formats.torchao import INSTALL, PACKAGE, is_installed, quiet_import
from secateur.runtime import hook

_NO_MODEL = (
    StrictDataclassError, ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What transformers raises for a config that makes no sense, or weights that are another model's."""
_HINT = "config.json does not belong to these weights, or was changed; get the model again"


def load_model(folder: Path, *, device: str = "auto", dtype: str = "auto") -> transformers.PreTrainedModel:
    """The model of a folder in eval mode.

    Args:
        device: auto takes an accelerator when there is one.
        dtype: auto is the format of the file.

    Raises:
        UsageError: for an unknown device or dtype.
        UnsupportedModelError: when transformers has no class of the name in config.json.
        MissingExtraError: for a model of torchao where that is not installed.
        CheckpointError: when config and weights do not make a model.
    """
    where = resolve_device(device)
    parse_dtype(dtype, "dtype")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    stock: Any = getattr(transformers, name, None)
    if stock is None:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no class {name}", hint="a newer transformers may have it"
        )
    rounded = (config.get("quantization_config") or {}).get("quant_method") == PACKAGE
    if rounded and not is_installed():
        raise MissingExtraError(f"{folder} holds numbers of torchao, which is not installed", hint=INSTALL)
    hook.install()
    with quiet_loading(), quiet_import() if rounded else contextlib.nullcontext():
        try:
            # Given, so that a converted folder is opened by the config of its architecture.
            known = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            model, info = stock.from_pretrained(
                folder,
                config=known,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except _NO_MODEL as error:
            told = " ".join(str(error).split())
            raise CheckpointError(
                f"{folder} cannot be opened by transformers: {type(error).__name__}: {told}", hint=_HINT
            ) from error
    # A bare encoder is often saved without what it pools by, which nothing here looks at.
    unused = "pooler." if model.base_model is model else None
    missing = sorted(key for key in map(str, info["missing_keys"]) if unused is None or not key.startswith(unused))
    if missing:  # the loader only warns, and makes weights up
        raise CheckpointError(f"{folder} lacks weights of the model, the first is {missing[0]}", hint=_HINT)
    return model.eval().to(where)

"""Open a model folder whole, by the stock class its config names, to run it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from secateur.engine.device import parse_dtype, resolve_device
from secateur.errors import MissingExtraError, UnsupportedModelError
from secateur.formats.torchao import INSTALL, PACKAGE, is_installed, quiet_import
from secateur.runtime import hook


def load_model(folder: Path, *, device: str = "auto", dtype: str = "auto") -> transformers.PreTrainedModel:
    """The model of a folder in eval mode.

    Args:
        device: auto takes an accelerator when there is one.
        dtype: auto is the format of the file.

    Raises:
        UsageError: for an unknown device or dtype.
        UnsupportedModelError: when transformers has no class of the name in config.json.
        MissingExtraError: for a model of torchao where that is not installed.
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
        # Given, so that a converted folder is opened by the config of its architecture.
        known = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model = stock.from_pretrained(folder, config=known, dtype=dtype, local_files_only=True, use_safetensors=True)
    return model.eval().to(where)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Progress is told through a reporter, not by libraries."""
    logging = transformers.utils.logging
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()

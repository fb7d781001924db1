"""Which device and which number formats a run uses, and how much memory its activations may take."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import torch

from secateur.budgets import parse_size
from secateur.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """``auto`` is the accelerator if there is one.

    Raises:
        UsageError: for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        accelerator: Any = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device '{name}' cannot be used: {str(error).splitlines()[0]}", hint="use cpu, cuda, cuda:1, mps or auto"
        ) from None
    return device


def parse_dtype(name: str, flag: str) -> torch.dtype | None:
    """A number format by name; None for ``auto``.

    Raises:
        UsageError: for any other name.
    """
    if name == "auto":
        return None
    if name not in DTYPES:
        raise UsageError(f"{flag} is '{name}'", hint=f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Number format of the calibration forward: bfloat16 where the processor multiplies it natively, else float32.

    Raises:
        UsageError: for an unknown name.
    """
    return parse_dtype(name, "compute_dtype") or (torch.bfloat16 if _native_bfloat16(device) else torch.float32)


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def trim_memory() -> None:
    """Hand freed memory back to the system where the C library can; otherwise it counts as resident until reused."""
    gc.collect(0)
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # not glibc: nothing to do


def activation_limit(text: str) -> int:
    """Bytes that activations may take: a size such as 2GB, or ``auto`` for half of the memory that is free now.

    Raises:
        UsageError: when the text is no size.
    """
    if text == "auto":
        import psutil

        return int(psutil.virtual_memory().available // 2)
    size = parse_size(text)
    if size is None:
        raise UsageError(f"activation_memory is '{text}'", hint="give a size such as 500MB or 2GB")
    return size

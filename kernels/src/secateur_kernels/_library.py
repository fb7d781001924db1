"""The shared library beside this file, opened by ctypes, which needs no headers of Python and fits any version."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

ABI = 1
"""Of the functions below; the library must have the same."""
ENVIRONMENT = "SECATEUR_KERNELS"
"""Names the variant to use from the start."""


class KernelError(ValueError):
    """Arguments that a kernel refuses, or a variant that this CPU cannot run."""


def _open() -> ctypes.CDLL:
    folder = os.environ.get("SECATEUR_KERNELS_LIBRARY")  # a library built by hand, as the tests of a checkout use it
    found = Path(folder) if folder else Path(__file__).with_name("_kernels.so")
    if not found.exists():
        raise ImportError(f"{found} is missing; the wheel of secateur-kernels brings it")
    library = ctypes.CDLL(str(found))
    if library.sk_abi() != ABI:
        raise ImportError(f"{found} has ABI {library.sk_abi()}, this package needs {ABI}")
    if not hasattr(library, "sk_highest"):
        raise ImportError(f"{found} is older than this package")
    return library


_library = _open()
_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_library.sk_message.restype = _library.sk_variant.restype = _library.sk_variant_name.restype = ctypes.c_char_p
_library.sk_use.argtypes = [ctypes.c_char_p]
_library.sk_check.argtypes = [ctypes.c_char_p]
_library.sk_linear.argtypes = [ctypes.c_char_p, _int, _pointer, _int, _long, _int, _pointer, _int]
_library.sk_block_before.argtypes = [
    ctypes.c_char_p, ctypes.c_char_p, _pointer, _int, _pointer, _pointer, _long, _long, _int, _pointer, _int,
]  # fmt: skip
_library.sk_block_behind.argtypes = [
    ctypes.c_char_p, ctypes.c_char_p, _pointer, _pointer, _int, _int, _pointer, _int,
]  # fmt: skip
_library.sk_decode.argtypes = [
    ctypes.c_char_p, ctypes.c_char_p, _int, ctypes.c_char_p, ctypes.c_char_p, _pointer, _int, _pointer, _pointer, _int,
    _pointer, _int,
]  # fmt: skip
_library.sk_unpack.argtypes = [ctypes.c_char_p, _long, _long, _pointer, _int, _int]
_library.sk_highest.argtypes = [_pointer, _int, _long]
_library.sk_highest.restype = _long
_library.sk_read.argtypes = [_pointer, _long, _int]
_library.sk_read.restype = ctypes.c_uint64

check = _library.sk_check
linear = _library.sk_linear
block_before = _library.sk_block_before
block_behind = _library.sk_block_behind
decode = _library.sk_decode
unpack = _library.sk_unpack
highest = _library.sk_highest


def refused(status: int) -> KernelError:
    """The error of a status that is not zero."""
    return KernelError(_library.sk_message(status).decode())


def variants() -> dict[str, bool]:
    """Every variant that is built in, best first, and whether this CPU can run it."""
    numbers = range(_library.sk_variant_count())
    return {_library.sk_variant_name(number).decode(): bool(_library.sk_variant_runs(number)) for number in numbers}


def variant() -> str:
    """The variant in use."""
    return str(_library.sk_variant().decode())


def use(name: str | None) -> None:
    """Choose the variant for all calls that follow; None is the best that this CPU runs.

    Raises:
        KernelError: naming those that it can run.
    """
    if _library.sk_use(None if name is None else name.encode()):
        able = ", ".join(key for key, runs in variants().items() if runs)
        raise KernelError(f"kernel variant {name!r} is unknown, or this CPU cannot run it; it can run {able}")


def read(address: int, nbytes: int, threads: int) -> int:
    """Read memory once, for measuring what its bandwidth is."""
    return int(_library.sk_read(address, nbytes, threads))


if os.environ.get(ENVIRONMENT):
    use(os.environ[ENVIRONMENT])

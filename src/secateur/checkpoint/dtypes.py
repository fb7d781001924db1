"""The number formats of the safetensors file format and their torch names."""

from __future__ import annotations

import torch

# In the order in which safetensors sorts tensors inside a file: it writes the last of this list first, so that wide
# numbers come first and every tensor is aligned to its own width.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
RANK: dict[torch.dtype, int] = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_DTYPES.values())}

PLAIN_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Formats whose numbers mean themselves. Anything narrower is a quantised checkpoint."""

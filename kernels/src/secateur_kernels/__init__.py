"""CPU kernels for the sparse format of secateur: products with packed matrices, and their unpacking.

Tensors are those of PyTorch, or anything that has ``dtype``, ``shape``, ``is_contiguous()`` and ``data_ptr()`` as they
do; nothing of PyTorch is imported. A matrix is described once, by `describe`, which checks it; the products take
that description.
"""

from secateur_kernels._block import Block
from secateur_kernels._decoder import Cache, Decoder, Layer
from secateur_kernels._library import ABI, KernelError, read, use, variant, variants
from secateur_kernels._matrix import ACTIVATIONS, Matrix, describe, highest, linear, linear_many, unpack

__version__ = "0.1.0"
__all__ = [
    "ABI",
    "ACTIVATIONS",
    "Block",
    "Cache",
    "Decoder",
    "KernelError",
    "Layer",
    "Matrix",
    "describe",
    "highest",
    "linear",
    "linear_many",
    "read",
    "unpack",
    "use",
    "variant",
    "variants",
]

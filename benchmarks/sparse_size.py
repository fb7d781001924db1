"""How many bits a weight the sparse format takes.

The 210 matrices of the blocks of SmolLM2-135M, by their shapes, filled with random normal weights of which the
smallest in each row are zero (for 2:4: of every four). Bits and bytes are those of all tensors of all matrices, padding
included, counted after packing; the files hold a header of some kilobytes more. Rounding makes a few more weights zero.

    python benchmarks/sparse_size.py
"""

from __future__ import annotations

import _common
import torch

from secateur.packing.pack import Setting, best, count, entries_for, pack

SHAPES = {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}
"""(outputs, inputs): how many in the model."""
CASES = {
    "50 %": (0.5, "unstructured"), "70 %": (0.7, "unstructured"), "2:4": (0.5, "2:4"), "none": (0.0, "unstructured"),
}  # fmt: skip
SETTINGS = {"16": Setting(16), "8": Setting(8), "8, groups of 64": Setting(8, 64), "4, groups of 64": Setting(4, 64)}


def matrix(shape: tuple[int, int], sparsity: float, pattern: str) -> torch.Tensor:
    """Random weights with their smallest removed."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).float()
    parts = weights.reshape(-1, 4) if pattern == "2:4" else weights
    remove = 2 if pattern == "2:4" else round(sparsity * shape[1])
    order = parts.abs().argsort(dim=1)
    return parts.scatter(1, order[:, :remove], 0.0).reshape(shape)


def main() -> None:
    rows = []
    for zeros, (sparsity, pattern) in CASES.items():
        for bits, setting in SETTINGS.items():
            nbytes = weights = 0
            kinds = set()
            for shape, times in SHAPES.items():
                made = matrix(shape, sparsity, pattern)
                entry = best(entries_for(count(made, setting), setting))
                kinds.add(entry.kind)
                nbytes += times * sum(tensor.nbytes for tensor in pack(made, entry).values())
                weights += times * made.numel()
            rows.append({
                "zeros": zeros, "bits_of_a_value": bits, "kind": ", ".join(sorted(kinds)),
                "bits_per_weight": round(8 * nbytes / weights, 2), "bytes": nbytes,
            })  # fmt: skip
    _common.store("sparse_size", " ".join(" ".join(__doc__.split("\n\n")[1:-1]).split()), rows)


if __name__ == "__main__":
    main()

"""Speed of the CPU kernels on one row of activations: packed against our own dense kernels, and against reading alone.

Random matrices; copies of each lie in memory of their own, together larger than the caches. In every round each format
makes one pass over its copies, then memory is read once: A B C A B C. Samples in which the process was interrupted
are left out. A ratio is the median over the rounds of dense by packed, both of that round.

    python benchmarks/kernels.py [--sizes 2048x2048,576x576] [--threads 1,2] [--rounds 30] [--megabytes 192]
                                 [--activations int8-token] [--tokens 1] [--variant avx2]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import _common

SIZES = "2048x2048,4096x4096,8192x2048,576x576,1536x576,576x1536"
"""Rows x columns: large, and those of the demo model."""
# name -> kind, bits, share of zeros, the dense format it is compared with
FORMATS: dict[str, tuple[str, int, float, str]] = {
    "dense bf16": ("dense", 16, 0.5, ""),
    "mask bf16 50 %": ("mask", 16, 0.5, "dense bf16"),
    "mask bf16 70 %": ("mask", 16, 0.7, "dense bf16"),
    "dense int8": ("dense", 8, 0.5, ""),
    "2:4 int8": ("2:4", 8, 0.5, "dense int8"),
    "mask int8 50 %": ("mask", 8, 0.5, "dense int8"),
    "mask int8 70 %": ("mask", 8, 0.7, "dense int8"),
    "dense int4": ("dense", 4, 0.5, ""),
    "mask int4 50 %": ("mask", 4, 0.5, "dense int4"),
    "mask int4 70 %": ("mask", 4, 0.7, "dense int4"),
}


class Copies:
    """Copies of one random matrix in one format, and a pass over them."""

    def __init__(self, name: str, rows: int, columns: int, nbytes: int, tokens: int) -> None:
        import torch

        from secateur.packing.pack import Setting, count, entries_for, pack
        from secateur.packing.unpack import row_starts

        kind, bits, sparsity, _ = FORMATS[name]
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=generator)
        if kind == "2:4":
            order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
            weight *= (order < 2).reshape(rows, columns)
        elif kind == "mask":
            weight *= torch.rand(rows, columns, generator=generator) >= sparsity
        setting = Setting(bits, 64 if bits == 4 else 0, "bfloat16" if bits == 16 else "")
        self.entry = entries_for(count(weight, setting), setting)[kind]
        tensors = pack(weight, self.entry)
        starts = row_starts(self.entry, tensors)
        number = max(1, -(-nbytes // self.entry.nbytes))
        self.held = [{part: tensor.clone() for part, tensor in tensors.items()} for _ in range(number)]
        self.matrices = [describe(self.entry, one, starts) for one in self.held]
        self.starts = starts
        dtype = torch.bfloat16
        self.x = torch.randn(tokens, columns, generator=generator).to(dtype)
        self.out = torch.empty(tokens, rows, dtype=dtype)

    def one_pass(self, activations: int, threads: int) -> None:
        import secateur_kernels

        for matrix in self.matrices:
            secateur_kernels.linear(matrix, self.x, self.out, activations, threads)


def describe(entry: Any, tensors: Any, starts: Any) -> Any:
    """A matrix as the kernels take it."""
    import secateur_kernels

    return secateur_kernels.describe(
        entry.kind,
        entry.rows,
        entry.columns,
        entry.bits,
        tensors["values"],
        group_size=entry.group_size,
        pattern=tensors.get("mask" if entry.kind == "mask" else "index"),
        scales=tensors.get("scales"),
        starts=starts if entry.kind == "mask" else None,
    )


def seconds(work: Callable[[], object]) -> float | None:
    """Of one run of the work; None when another process took the processor away."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    started = time.perf_counter()
    work()
    taken = time.perf_counter() - started
    return taken if resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == before else None


def measure(rows: int, columns: int, threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of the table for each format."""
    import secateur_kernels
    import torch

    nbytes = int(options.megabytes * 1e6)
    activations = secateur_kernels.ACTIVATIONS[options.activations]
    copies = {name: Copies(name, rows, columns, nbytes, options.tokens) for name in FORMATS}
    plain = torch.ones(max(nbytes, 64), dtype=torch.uint8)

    def work(name: str) -> Callable[[], object]:
        if name == "read":
            return lambda: secateur_kernels.read(plain.data_ptr(), plain.numel(), threads)
        return lambda: copies[name].one_pass(activations, threads)

    names = [*FORMATS, "read"]
    samples: dict[str, list[float | None]] = {name: [] for name in names}
    for name in names:
        work(name)()
    for _ in range(options.rounds):
        for name in names:
            samples[name].append(seconds(work(name)))
    speed_of_reading = median([plain.numel() / taken for taken in samples["read"] if taken])
    found = []
    for name, (_, _, _, dense) in FORMATS.items():
        own = copies[name]
        each = median([taken / len(own.matrices) for taken in samples[name] if taken])
        pairs = zip(samples[dense], samples[name], strict=True) if dense else ()
        scale = len(own.matrices) / len(copies[dense].matrices) if dense else 1.0
        ratios = [scale * slow / fast for slow, fast in pairs if slow and fast]
        rate = own.entry.nbytes / each if each else None
        found.append(
            {
                "rows x columns": f"{rows}x{columns}",
                "threads": threads,
                "format": name,
                "bits per weight": 8 * own.entry.nbytes / own.entry.numel,
                "microseconds": each and each * 1e6,
                "GB/s": rate and rate / 1e9,
                "of reading": rate and speed_of_reading and rate / speed_of_reading,
                "times dense": median(ratios),
                "samples": sum(taken is not None for taken in samples[name]),
            }
        )
    return found


def median(numbers: list[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--megabytes", type=float, default=192)
    parser.add_argument("--activations", default="int8-token")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--variant")
    options = parser.parse_args()
    import secateur_kernels

    secateur_kernels.use(options.variant)
    rows = []
    for size in options.sizes.split(","):
        height, width = map(int, size.split("x"))
        for threads in map(int, options.threads.split(",")):
            rows += measure(height, width, threads, options)
    _common.store(
        "kernels",
        " ".join(__doc__.split("\n\n")[1].split()),
        rows,
        variant=secateur_kernels.variant(),
        kernels=secateur_kernels.__version__,
        options=vars(options),
    )


if __name__ == "__main__":
    main()

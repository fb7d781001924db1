"""Several tokens at once through packed weights: the kernels, unpacking for a dense product, and the dense model.

The demo model with half of its weights zero (by magnitude: speed does not ask which), dense and packed, both computing
in bfloat16, in one process. In every round each goes once through prompts of every length, in turn, after a round that
warms up; logits of the last token only. "kernels" multiplies packed weights whatever the number of tokens, "unpacked"
unpacks half a million weights at a time for a product of PyTorch, "chosen" does what the package does: the one up
to a number of tokens, the other above. Ratios are medians over the rounds of the dense model's seconds by theirs, with
the least and the most.

    python benchmarks/prefill.py [--tokens 2,4,8,16,32,64,128,512] [--threads 1,2] [--rounds 9] [--bits 8,16]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _common

WAYS = {"kernels": 1 << 30, "unpacked": 0, "chosen": None}
"""Way -> most tokens that the kernels take at once; None leaves it as it is."""


def seconds(model: Any, ids: Any) -> float:
    """Of one forward."""
    started = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def measure(dense: Any, packed: dict[str, Any], lengths: list[int], threads: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each packed model and length."""
    import torch

    from secateur.runtime import ops

    usual = ops.TOKENS
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(1000, 2000, (1, length), generator=generator)
        taken: dict[tuple[str, str], list[float]] = {}
        for number in range(rounds + 1):
            found = {("dense", ""): seconds(dense, ids)}
            for form, model in packed.items():
                for way, most in WAYS.items():
                    ops.TOKENS = usual if most is None else most
                    found[form, way] = seconds(model, ids)
            ops.TOKENS = usual
            if number:
                for key, value in found.items():
                    taken.setdefault(key, []).append(value)
        own = taken["dense", ""]
        for form in packed:
            row: dict[str, Any] = {"form": form, "threads": threads, "tokens": length}
            row["dense, ms"] = statistics.median(own) * 1e3
            for way in WAYS:
                ratios = [slow / fast for slow, fast in zip(own, taken[form, way], strict=True)]
                row[way] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="2,4,8,16,32,64,128,512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bits", default="8,16")
    options = parser.parse_args()
    import secateur_kernels
    import torch
    from transformers import AutoModelForCausalLM

    import secateur  # noqa: F401  registers the format

    lengths, rows = list(map(int, options.tokens.split(","))), []
    with tempfile.TemporaryDirectory() as scratch:
        pruned = Path(scratch) / "pruned"
        _common.secateur(
            "prune", "demo", "-o", str(pruned), "--method", "magnitude", "--sparsity", "0.5", "--no-evaluate",
            "--no-verify", "--quiet",
        )  # fmt: skip
        packed = {}
        for bits in options.bits.split(","):
            out = Path(scratch) / bits
            _common.secateur("export", str(pruned), "-o", str(out), "--format", "sparse", "--bits", bits, "--no-verify",
                             "--quiet")  # fmt: skip
            packed[f"50 %, {bits} bits"] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
        dense = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            for threads in map(int, options.threads.split(",")):
                rows += measure(dense, packed, lengths, threads, options.rounds)
    _common.store(
        "prefill", " ".join(__doc__.split("\n\n")[1].split()), rows, variant=secateur_kernels.variant(),
        kernels=secateur_kernels.__version__, rounds=options.rounds,
    )  # fmt: skip


if __name__ == "__main__":
    main()

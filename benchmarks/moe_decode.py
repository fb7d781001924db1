"""One token through a feed-forward network, dense and cut into experts: seconds, in turn, on random weights.

Each network is one of several of its size, so that no cache holds them all; router and choice are included.

    python benchmarks/moe_decode.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import _common
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from secateur.layers import moe

SHAPES = {"1 B (2,048 x 8,192)": (2048, 8192, 64, 3), "demo (576 x 1,536)": (576, 1536, 48, 30)}
"""Hidden size, neurons, experts, and networks that are run one after the other."""


def seconds(layers: Sequence[Any], x: torch.Tensor) -> float:
    """Of one token through all of them."""
    started = time.perf_counter()
    with torch.inference_mode():
        for layer in layers:
            layer(x)
    return (time.perf_counter() - started) / len(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds, rows = parser.parse_args().rounds, []
    for name, (hidden, neurons, experts, count) in SHAPES.items():
        torch.manual_seed(0)
        dense = [LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=neurons)) for _ in range(count)]
        x = torch.randn(1, 1, hidden)
        for share in (1.0, 0.5, 0.25):
            entry = {
                "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "act": "act_fn", "experts": experts,
                "top": round(share * experts), "router": "mlp",
            }  # fmt: skip
            cut = [moe.build(layer, entry) for layer in dense]
            for layer in cut:
                for parameter in layer.parameters():
                    torch.nn.init.normal_(parameter, std=0.02)
            seconds(dense, x), seconds(cut, x)
            pairs = [(seconds(dense, x), seconds(cut, x)) for _ in range(rounds)]
            ratios = sorted(first / second for first, second in pairs)
            rows.append({
                "network": name, "active": share, "dense_ms": 1e3 * statistics.median(first for first, _ in pairs),
                "experts_ms": 1e3 * statistics.median(second for _, second in pairs),
                "times_faster": statistics.median(ratios), "low": ratios[rounds // 10],
                "high": ratios[-1 - rounds // 10],
            })  # fmt: skip
    _common.store("moe_decode", f"float32, one token, {rounds} rounds in turn, 10 to 90 % of the ratios", rows)


if __name__ == "__main__":
    main()

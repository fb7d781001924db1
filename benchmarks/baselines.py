"""Pruned models beside what one would otherwise take, in one run of `secateur bench --baselines` each.

"sparse" has half of its weights zero (SparseGPT), "smaller" a fifth of them removed as neurons (least squares), both by
the built-in text. The dense model runs in float32 and bfloat16 in transformers, and with 8 and 4 bits in llama.cpp.
Perplexity is that of the measuring half of the built-in text; "of dense" is the mean of the shares of parameters,
operations, bits of a number and bytes. Ratios of speed are the pruned model's by this row's, medians of 7 rounds.

    python benchmarks/baselines.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import _common

MODELS = {
    "sparse": ["--method", "sparsegpt", "--sparsity", "0.5"],
    "smaller": ["--structure", "ffn", "--sparsity", "0.2"],
}
COLUMNS = {
    "bytes_disk": "file MB", "bytes_resident": "memory MB", "flops_per_token": "MFLOP a token",
    "perplexity": "perplexity",
    "prefill_tokens_per_second": "prefill tokens/s", "decode_tokens_per_second": "decode tokens/s",
    "decode_tokens_per_second_batch_8": "8 rows tokens/s", "efficiency": "of dense",
}  # fmt: skip
MILLIONS = ("bytes_disk", "bytes_resident", "flops_per_token")


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for title, arguments in MODELS.items():
            out = str(Path(scratch) / title)
            _common.secateur("prune", "demo", "-o", out, *arguments, "--no-evaluate", "--no-verify", "--quiet")
            found = json.loads(_common.secateur("bench", out, "--baselines", "--json", "--quiet").stdout)
            for row in (found, *found["against"]):
                name = title if row is found else "demo"
                made = {"compared with": title, "model": name, "runtime": row["runtime"], "format": row["format"]}
                for key, column in COLUMNS.items():
                    value = row[key]
                    made[column] = value / 1e6 if value is not None and key in MILLIONS else value
                ratio = found["ratio"].get(f"{row['name']} ({row['runtime']}, {row['format']})", {})
                decode = ratio.get("decode_tokens_per_second")
                made["decode ratio"] = (
                    f"{decode['median']:.2f} ({decode['low']:.2f} to {decode['high']:.2f})" if decode else ""
                )
                rows.append(made)
                print(json.dumps(made), flush=True)
            print(*found["verdict"], sep="\n")
    _common.store("baselines", " ".join(" ".join(__doc__.split("\n\n")[1:-1]).split()), rows)


if __name__ == "__main__":
    main()

"""A pruned model as a .gguf file in llama.cpp, against its folder in transformers.

The demo model as it is and pruned (Wanda, 50 %), exported in several number formats by `secateur export`, which
compares llama.cpp (package xllamacpp) with transformers on 256 next tokens of the built-in text. Perplexities are those
of these 256 tokens; "ratio" is the file's in llama.cpp by the folder's in transformers. Log-probabilities differ
between the two programs computing with the file's own weights, over the next token and the ten likeliest, in nats.
Speeds are llama.cpp's own clock (prompt of 257 tokens, 64 new ones) and, in the row of the folder, that of transformers
in float32, with the same number of threads.

    SECATEUR_DATA=folder python benchmarks/export_gguf.py [--formats f16,q8_0,q4_0] [--only dense,pruned]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference


def folder_row(name: str, folder: Path) -> dict[str, Any]:
    """Bytes of the folder's weights, and the speed of transformers."""
    import torch

    from secateur.measure.compare import Worker

    with Worker(folder, dtype="float32", threads=torch.get_num_threads()) as worker:
        decoded = [worker.ask("decode", prompt_tokens=list(range(300, 557)), new_tokens=64) for _ in range(2)][-1]
    return {
        "model": name,
        "format": "folder",
        "MB": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
        "prefill tokens/s": 257 / decoded["prefill_seconds"],
        "decode tokens/s": decoded["tokens"] / decoded["seconds"],
    }


def file_row(name: str, model: str, quantize: str, scratch: Path) -> dict[str, Any]:
    """One exported file."""
    out = scratch / f"{name}-{quantize}.gguf"
    done = _common.secateur("export", model, "-o", str(out), "--quantize", quantize, "--json", "--quiet")
    found = json.loads(done.stdout)
    out.unlink()
    ran = found["runtime"]
    if not ran:
        raise SystemExit("install xllamacpp first: pip install 'secateur[gguf]'")
    return {
        "model": name,
        "format": quantize,
        "MB": found["bytes_disk"] / 1e6,
        "zeros lost": found["zeros_lost"],
        "mean difference": ran["mean_difference"],
        "largest difference": ran["largest_difference"],
        "same best": ran["same_best"],
        "perplexity": ran["perplexity"],
        "ratio": ran["perplexity_ratio"],
        "prefill tokens/s": ran["prefill_tokens_per_second"],
        "decode tokens/s": ran["decode_tokens_per_second"],
        "seconds": done.seconds,
        "peak MB": done.peak_rss_bytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="f32,f16,bf16,q8_0,q5_1,q5_0,q4_1,q4_0")
    parser.add_argument("--only", default="dense,pruned")
    options = parser.parse_args()

    from secateur.checkpoint.source import open_source

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {"dense": "demo"}
        if "pruned" in options.only:
            models["pruned"] = str(Path(scratch) / "pruned")
            _reference.prune("wanda", Path(models["pruned"]), _common.data_folder())
        for name in options.only.split(","):
            rows.append(folder_row(name, open_source(models[name]).folder))
            for quantize in options.formats.split(","):
                rows.append(file_row(name, models[name], quantize, Path(scratch)))
                print(f"{name} {quantize} done", file=sys.stderr)
    _common.store("export_gguf", " ".join(" ".join(__doc__.split("\n\n")[1:-1]).split()), rows)


if __name__ == "__main__":
    main()

"""How fast a packed folder is opened, and what it takes in memory, against the dense one.

The demo model pruned to 50 % zeros by magnitude, as an ordinary folder and as `secateur export --format sparse` makes
one of it, with kernels. Each opening is a fresh process, in turn: dense, sparse, dense, sparse. Files are read once
before, so that they lie in the page cache. Timed is `from_pretrained`, with the class of the model imported before, and
with it a look at every page of every weight: files are mapped, and until it is looked at a page is not there. Memory is
what is resident then, less what is resident in an interpreter that has imported torch, transformers and secateur and
nothing else. Medians.

    python benchmarks/loading.py [--rounds 7] [--bits 8] [--dense FOLDER --sparse FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _common


def load(folder: Path | None) -> dict[str, Any]:
    """In a process of its own: seconds to open, seconds until every page was looked at, and resident bytes."""
    import psutil
    import torch
    import transformers

    import secateur  # noqa: F401 - transformers then knows the format

    found: dict[str, Any] = {}
    if folder is not None:
        transformers.utils.logging.disable_progress_bar()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stock = getattr(transformers, config["architectures"][0])
        started = time.perf_counter()
        model = stock.from_pretrained(folder, dtype="auto", local_files_only=True)
        found["opened"] = time.perf_counter() - started
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.detach().reshape(-1)[:: max(1, 4096 // tensor.element_size())].sum()
        found["seconds"] = time.perf_counter() - started
        with torch.inference_mode():
            model(torch.tensor([[1]]))
        found["first token"] = time.perf_counter() - started
    found["resident"] = psutil.Process().memory_info().rss
    return found


def fresh(folder: Path | None) -> dict[str, Any]:
    """`load` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--load", str(folder or "")]
    return dict(json.loads(_common.run(command).stdout.splitlines()[-1]))


def size(folder: Path) -> int:
    """Bytes of the weights; reading them puts them into the page cache."""
    return sum(len(path.read_bytes()) for path in folder.glob("*.safetensors"))


def measure(folders: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """One row for each folder."""
    sizes = {name: size(folder) for name, folder in folders.items()}
    empty = statistics.median(fresh(None)["resident"] for _ in range(3))
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for _ in range(rounds):
        for name, folder in folders.items():
            samples[name].append(fresh(folder))
    rows = []
    for name, found in samples.items():
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        rows.append({
            "folder": name,
            "MB": sizes[name] / 1e6,
            "opened, s": middle["opened"],
            "all pages, s": middle["seconds"],
            "fastest, s": min(one["seconds"] for one in found),
            "MB/s": sizes[name] / 1e6 / middle["seconds"],
            "first token, s": middle["first token"],
            "resident MB": (middle["resident"] - empty) / 1e6,
            "more than the file, MB": (middle["resident"] - empty - sizes[name]) / 1e6,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bits", default="8")
    parser.add_argument("--dense", type=Path, help="an ordinary folder, in place of the pruned demo model")
    parser.add_argument("--sparse", type=Path, help="the same in the sparse format")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load is not None:
        print(json.dumps(load(Path(options.load) if options.load else None)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        dense, sparse = options.dense or Path(scratch) / "dense", options.sparse or Path(scratch) / "sparse"
        if options.dense is None:
            quick = ["--sparsity", "0.5", "--no-verify", "--no-evaluate", "--quiet"]
            _common.secateur("prune", "demo", "-o", str(dense), "--method", "magnitude", *quick)
        if options.sparse is None:
            more = ["--format", "sparse", "--bits", options.bits, "--no-verify", "--quiet"]
            _common.secateur("export", str(dense), "-o", str(sparse), *more)
        rows = measure({"dense": dense, f"sparse, {options.bits} bits": sparse}, options.rounds)
    protocol = " ".join(__doc__.split("\n\n")[1].split())
    from secateur.runtime import kernels

    told = kernels.told() if kernels.find().module else kernels.find().reason
    _common.store("loading", f"{protocol} {options.rounds} rounds; {told}.", rows)


if __name__ == "__main__":
    main()

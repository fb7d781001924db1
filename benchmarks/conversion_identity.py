"""Conversions of the demo model that must change nothing, and what each adds or saves, against the formulas.

Each row is a conversion whose setting is the identity, or one whose parameters a formula tells. "difference" is the
largest between a logit of the result and one of the model that it must equal, over all logits of 512 tokens of the
WikiText-2 validation text, in float32; "of the largest" is the same as a share of the largest logit. "rounding" is how
far the demo model is from itself when its neurons are only listed in another order. Parameters are those in the file;
"formula" is what they should be. Models to fuse are the demo model with noise in every matrix of its blocks.

    SECATEUR_DATA=folder python benchmarks/conversion_identity.py [--only "moe 48 of 48"]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from secateur.checkpoint.source import open_source
from secateur.measure.model import load_model
from secateur.recovery.adapter_moe import add_adapter_experts

DEMO, BLOCK, OUTSIDE = 134_515_008, 3_540_096, 28_312_128
LINEAR = 106_168_320
"""Parameters of the demo model, of one of its blocks, of all outside the blocks; of all linear layers of the blocks."""
FULL = ["--rank", "full", "--weighting", "none"]


class Bench:
    """A folder for what is made, the demo model, and the tokens that are compared."""

    def __init__(self, scratch: Path, data: Path) -> None:
        self.scratch, self.demo = scratch, open_source("demo").folder
        text = (data / "wikitext2-valid.txt").read_text(encoding="utf-8")[:8000]
        tokens = AutoTokenizer.from_pretrained(self.demo)(text)["input_ids"]
        self.ids = torch.tensor(tokens[:512]).reshape(2, 256)
        self.dense = self.logits(load_model(self.demo, dtype="float32"))

    def logits(self, model: Any) -> torch.Tensor:
        """(2, 256, vocabulary) float32."""
        with torch.inference_mode():
            found: torch.Tensor = model(self.ids, use_cache=False).logits.float()
        return found

    def convert(self, source: str | Path, name: str, *arguments: str) -> tuple[Path, int]:
        """The folder of a conversion, and the parameters in its file."""
        out = self.scratch / name
        done = _common.secateur(
            "convert", str(source), "-o", str(out), *arguments, "--no-verify", "--no-evaluate", "--json", "--quiet"
        )
        return out, int(json.loads(done.stdout)["after"]["parameters"])

    def noisy(self, seed: int) -> Path:
        """The demo model with a little noise in every matrix of its blocks, as if it had been trained further."""
        folder = self.scratch / f"noisy-{seed}"
        shutil.copytree(self.demo, folder)
        path, generator = folder / "model.safetensors", torch.Generator().manual_seed(seed)
        tensors = load_file(path)
        for key, tensor in tensors.items():
            if ".layers." in key and tensor.ndim == 2:
                tensors[key] = tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    def row(self, found: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
        """How far logits are apart."""
        difference = float((found - wanted).abs().max())
        return {"difference": difference, "of the largest": difference / float(wanted.abs().max())}

    def same(self, name: str, *arguments: str, formula: int | None = None) -> dict[str, Any]:
        """A conversion of the demo model that must be the demo model."""
        out, parameters = self.convert("demo", name, *arguments)
        row = self.row(self.logits(load_model(out, dtype="float32")), self.dense)
        shutil.rmtree(out)
        return {**row, "parameters": parameters, "formula": formula}


def rounding(bench: Bench) -> dict[str, Any]:
    """The demo model with the neurons of each feed-forward network in another order."""
    model, generator = load_model(bench.demo, dtype="float32"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.model.layers:
            order = torch.randperm(block.mlp.up_proj.out_features, generator=generator)
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight.copy_(layer.weight[order].clone())
            block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, order].clone())
    return bench.row(bench.logits(model), bench.dense)


def one_model(bench: Bench) -> dict[str, Any]:
    """One fine-tuned model at full rank must be that model."""
    tuned = bench.noisy(1)
    out, parameters = bench.convert("demo", "one", "--to", "fused", "--models", str(tuned), "--rank", "full")
    wanted = bench.logits(load_model(tuned, dtype="float32"))
    row = bench.row(bench.logits(load_model(out, dtype="float32")), wanted)
    shutil.rmtree(tuned), shutil.rmtree(out)
    sizes = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
    added = 30 * sum(min(size) * sum(size) for size in sizes)
    return {**row, "parameters": parameters, "formula": DEMO + added}


def two_models(bench: Bench) -> dict[str, Any]:
    """Two models at rank 8 with 4 directions for the router."""
    models = [str(bench.noisy(seed)) for seed in (2, 3)]
    options = ["--to", "fused", "--models", *models, "--rank", "8", "--router-rank", "4"]
    out, parameters = bench.convert("demo", "two", *options)
    for folder in (*models, out):
        shutil.rmtree(folder)
    return {"parameters": parameters, "formula": DEMO + 6_082_560}


def shared_centre(bench: Bench) -> dict[str, Any]:
    """Chains of five at full rank whose middle is one for all blocks."""
    out, parameters = bench.convert("demo", "centre", "--to", "factorized", "--cores", "5", "--share-central", *FULL)
    shutil.rmtree(out)
    return {"parameters": parameters, "formula": DEMO - LINEAR + 13_566_744}


def groups(bench: Bench) -> dict[str, Any]:
    """Ten groups; all their iterations must be the tied model."""
    tied, parameters = bench.convert("demo", "tied", "--to", "shared", "--groups", "10")
    out, _ = bench.convert(tied, "iterated", "--to", "shared", "--iterations", "30")
    wanted, found = (bench.logits(load_model(folder, dtype="float32")) for folder in (tied, out))
    shutil.rmtree(tied), shutil.rmtree(out)
    return {**bench.row(found, wanted), "parameters": parameters, "formula": 10 * BLOCK + OUTSIDE}


def adapters(bench: Bench) -> dict[str, Any]:
    """Eight adapters of 64 behind each network, as `recover --mode adapter-moe` begins."""
    model = load_model(bench.demo, dtype="float32")
    add_adapter_experts(model, experts=8, top=2, dim=64, seed=0)
    row = bench.row(bench.logits(model), bench.dense)
    return {**row, "parameters": model.num_parameters(), "formula": DEMO + 17_832_960}


MOE = ("--to", "moe", "--experts", "48", "--top-k", "48", "--samples", "2", "--sequence-length", "128")
RUNS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "rounding": rounding,
    "factorized, 2 cores, full rank": lambda bench: bench.same("2-cores", "--to", "factorized", *FULL),
    "factorized, 5 cores, full rank": lambda bench: bench.same("5-cores", "--to", "factorized", "--cores", "5", *FULL),
    "factorized, 5 cores, full rank, one centre": shared_centre,
    "fused, one model, full rank": one_model,
    "fused, two models, rank 8, router 4": two_models,
    "moe, 48 of 48": lambda bench: bench.same("48", *MOE, formula=DEMO + 30 * (48 * 576 + 48 * 48)),
    "shared, 10 groups, all iterations": groups,
    "adapter-moe, 8 of 64, before training": adapters,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=tuple(RUNS))
    chosen = parser.parse_args().only
    path = _common.RESULTS / "conversion_identity.json"
    rows = {row["run"]: row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), _common.data_folder())
        for name in chosen:
            rows[name] = {"run": name, **RUNS[name](bench)}
            kept = [rows[one] for one in RUNS if one in rows]
            _common.store("conversion_identity", " ".join(__doc__.split("\n\n")[1].split()), kept)


if __name__ == "__main__":
    main()

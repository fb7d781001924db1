"""Conversions of the demo model: factors, experts, and several models in one.

By the reference protocol: calibration is the first 32 windows of 1,024 tokens of the WikiText-2 validation text,
perplexity is measured on the first 40 windows of 1,024 tokens of the test text. "factorized" keeps at most 80 % of the
block parameters; "plain" weights nothing by activations. "moe" cuts each feed-forward network into 48 experts of 32
neurons and computes so many of them for each token; "random" is the router by similarity with random numbers in its
place; "activations" and "coactivation" are the split, which is by weights elsewhere. "a" and "b" are the demo model
trained on sentences of SST-2, with a word for their label, and on the calibration half of the built-in Python text
(full, lm, 24,576 tokens each); "fused" is both in one at rank 32, "mean" the average of their weights. Their
perplexities are those of 20 windows of 512 tokens of the other sentences and of the other half.
Minutes are of the conversion, on one thread, with other work on both cores.

    SECATEUR_DATA=folder python benchmarks/conversions.py [--only "moe 24 oracle,fused"] [--keep folder]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference

MOE = ["--to", "moe", "--experts", "48"]
RUNS: dict[str, list[str]] = {
    "dense": [],
    "factorized 80%": ["--to", "factorized", "--budget", "parameters=0.8"],
    "factorized 80% plain": ["--to", "factorized", "--budget", "parameters=0.8", "--weighting", "none"],
    "moe 24 oracle": [*MOE, "--top-k", "24", "--router", "oracle"],
    "moe 24 mlp": [*MOE, "--top-k", "24"],
    "moe 24 similarity": [*MOE, "--top-k", "24", "--router", "similarity"],
    "moe 24 random": [*MOE, "--top-k", "24", "--router", "similarity"],
    "moe 24 mlp activations": [*MOE, "--top-k", "24", "--split", "activations"],
    "moe 24 mlp coactivation": [*MOE, "--top-k", "24", "--split", "coactivation"],
    "moe 12 oracle": [*MOE, "--top-k", "12", "--router", "oracle"],
    "moe 36 oracle": [*MOE, "--top-k", "36", "--router", "oracle"],
    "moe 48 oracle": [*MOE, "--top-k", "48", "--router", "oracle"],
}
SEVERAL = ("dense", "a", "b", "mean", "fused")
TOKENS, SENTENCES, WINDOWS = 24576, 4000, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default=",".join((*RUNS, "fused")), help="these, in this order; the others stay as they are"
    )
    parser.add_argument("--keep", type=Path, help="folder for the trained models, which are taken from there again")
    options = parser.parse_args()
    chosen, data = options.only.split(","), _common.data_folder()
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            rows = (
                [{"run": name, **_converted(name, Path(scratch) / "out", data)}]
                if name in RUNS
                else _several(options.keep or Path(scratch), data)
            )
            for row in rows:
                keep(row)


def keep(row: dict[str, Any]) -> None:
    """Put a row in the place of the one of its name, and store all."""
    path = _common.RESULTS / "conversions.json"
    rows: dict[str, dict[str, Any]] = {}
    if path.is_file():
        rows = {one["run"]: one for one in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    rows[row["run"]] = {**rows.get(row["run"], {}), **row}
    order = list(dict.fromkeys((*RUNS, *SEVERAL)))
    ordered = [rows[name] for name in order if name in rows]
    _common.store("conversions", " ".join(__doc__.split("\n\n")[1].split()), ordered)


def _converted(name: str, out: Path, data: Path) -> dict[str, Any]:
    if not RUNS[name]:
        return _reference.quality("demo", data, questions=False)
    done = _common.secateur(
        "convert", "demo", "-o", str(out), *RUNS[name], "--calibration", str(data / "wikitext2-valid.txt"),
        "--samples", str(_reference.SAMPLES), "--sequence-length", str(_reference.LENGTH), "--no-verify",
        "--no-evaluate", "--overwrite", "--json",
    )  # fmt: skip
    if name.endswith("random"):
        _randomise(out)
    made = json.loads(done.stdout)
    return {
        **_reference.quality(str(out), data, questions=False),
        "parameters": made["after"]["parameters"],
        "minutes": done.seconds / 60,
    }


def _randomise(folder: Path) -> None:
    """Put random numbers in the place of what routers know."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    found = [key for key in tensors if key.endswith("router_in")]
    if not found:
        raise SystemExit(f"no routers in {path}")
    for key in found:
        tensors[key] = torch.randn(tensors[key].shape, generator=generator).to(tensors[key].dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def _several(scratch: Path, data: Path) -> list[dict[str, Any]]:
    """Two descendants of the demo model, their mean and the two in one, on the text of each."""
    scratch.mkdir(exist_ok=True)
    learned, other = _sentences(data, scratch)
    folders = {name: str(scratch / name) for name in SEVERAL}
    folders["dense"] = "demo"
    for name, text in (("a", str(learned)), ("b", "builtin")):
        if Path(folders[name]).is_dir():
            continue
        _common.secateur(
            "recover", "demo", "-o", folders[name], "--dense", "--mode", "full", "--loss", "lm", "--data", text,
            "--tokens", str(TOKENS), "--sequence-length", "512", "--learning-rate", "5e-5", "--no-evaluate",
        )  # fmt: skip
    _mean(Path(folders["a"]), Path(folders["b"]), Path(folders["mean"]))
    done = _common.secateur(
        "convert", "demo", "-o", folders["fused"], "--to", "fused", "--models", folders["a"], folders["b"], "--rank",
        "32", "--router-rank", "8", "--no-verify", "--no-evaluate", "--overwrite",
    )  # fmt: skip
    rows = []
    for name, folder in folders.items():
        row: dict[str, Any] = {"run": name}
        for title, text in (("on sentences", str(other)), ("on Python text", "builtin")):
            found = _common.secateur(
                "evaluate", folder, "--data", text, "--sequence-length", "512", "--samples", str(WINDOWS), "--json",
                "--quiet",
            )  # fmt: skip
            row[title] = json.loads(found.stdout)["perplexity"]
        rows.append(row)
    rows[-1]["minutes"] = done.seconds / 60
    return rows


def _sentences(data: Path, folder: Path) -> tuple[Path, Path]:
    """Sentences with a word for their label: some to learn from, and others."""
    lines = [json.loads(line) for line in (data / "sst2-train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [f"{line['text']} This is {'good' if line['label'] else 'bad'}." for line in lines]
    paths = folder / "learned.txt", folder / "other.txt"
    for path, part in zip(paths, (texts[:SENTENCES], texts[SENTENCES:]), strict=True):
        path.write_text("\n\n".join(part), encoding="utf-8")
    return paths


def _mean(a: Path, b: Path, out: Path) -> None:
    """The plain average of two models."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(a, out, dirs_exist_ok=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    mean = {key: ((first[key].float() + second[key].float()) / 2).to(first[key].dtype) for key in first}
    save_file(mean, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()

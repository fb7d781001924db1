"""Decoding with packed weights: tokens a second of one model in several forms, in turn.

The forms are the dense model in bfloat16 (PyTorch, step by step); packed in int8 as it is, with 50 % and with 70 % of
the weights zero; and the dense model in llama.cpp as Q8_0 and Q4_0. Each has a process of its own; in every round each
decodes once, all in the same order, after a round that warms up. "loop" is the loop of `secateur generate` around the
kernels, "generate" that of transformers; llama.cpp by its own clock. A ratio is the median over the rounds, both of the
same round, with the least and the most; that of a loop is to the loop of the other, if it has one. Weights are pruned
by magnitude: speed does not ask which of them are zero.

    python benchmarks/decode.py [--model demo] [--rounds 7] [--threads 1,2] [--only q8_0,..] [--folder KEPT]
    python benchmarks/decode.py --model 1b --threads 2 --rounds 3     (random, of the shapes of Llama 3.2 1B)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _common

from secateur.checkpoint.source import open_source
from secateur.measure.compare import Worker
from secateur.measure.llama_cpp import INSTALL, LlamaCpp, is_installed

PROMPT = list(range(300, 332))
NEW = 64
PACKED = {"int8": 0.0, "int8 50%": 0.5, "int8 70%": 0.7}
LLAMA_CPP = ("q8_0", "q4_0")
FORMS = ("bf16", *PACKED, *LLAMA_CPP)
AGAINST = ("q8_0", "q4_0", "int8", "bf16")
SHAPES_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True, "rope_theta": 500000.0,
}  # fmt: skip


def make(model: str, form: str, folder: Path) -> Path:
    """The model in a form; what lies there already is taken."""
    made = folder / (f"{model}-{form}.gguf" if form in LLAMA_CPP else f"{model}-{form.replace(' ', '-')}")
    if made.exists():
        return made
    if form == "bf16":
        return open_source("demo").folder if model == "demo" else random_model(0.0, made)
    share = PACKED.get(form, 0.0)
    source, bare = str(make(model, "bf16", folder)), folder / f"{model}-zeros"
    if share and model == "demo":
        _common.secateur(
            "prune", source, "-o", str(bare), "--method", "magnitude", "--sparsity", str(share), "--no-evaluate",
            "--no-verify", "--quiet", "--overwrite",
        )  # fmt: skip
        source = str(bare)
    elif share:
        source = str(random_model(share, bare))
    how = ["gguf", "--quantize", form] if form in LLAMA_CPP else ["sparse", "--bits", "8", "--force"]
    _common.secateur("export", source, "-o", str(made), "--no-verify", "--quiet", "--format", *how)
    shutil.rmtree(bare, ignore_errors=True)
    return made


def random_model(share: float, out: Path) -> Path:
    """A Llama of about 1 B random weights in bfloat16, a share of those in its blocks zero."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    noise = 0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    least = noise.abs().sort().values[int(share * noise.numel())]
    sparse = torch.where(noise.abs() < least, 0.0, noise)
    config = LlamaConfig(**SHAPES_1B, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    for name, weight in model.named_parameters():
        flat = weight.detach().view(-1)
        drawn = noise if "layers" not in name else sparse
        for first in range(0, flat.numel(), noise.numel()):  # the same over and over: speed does not ask for more
            part = flat[first : first + noise.numel()]
            part.copy_(drawn[: part.numel()] if weight.ndim == 2 else torch.ones(part.numel()))
    model.save_pretrained(out)
    for file in open_source("demo").folder.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


def opened(form: str, path: Path, threads: int) -> Worker:
    """The process of a form."""
    if form in LLAMA_CPP:
        return LlamaCpp(path, context=512, threads=threads, exact=False)
    return Worker(path, "bfloat16" if form == "bf16" else "auto", threads=threads)


def speeds(form: str, worker: Worker) -> dict[str, float]:
    """Way of decoding -> tokens a second, in one round."""
    if form in LLAMA_CPP:
        return {"llama.cpp": worker.ask("speed", tokens=PROMPT, new_tokens=NEW, runs=1)["decode_tokens_per_second"]}
    if form == "bf16":
        found = worker.ask("decode", prompt_tokens=PROMPT, new_tokens=NEW)
        return {"PyTorch": found["tokens"] / found["seconds"]}
    found = {}
    for way in ("loop", "generate"):
        one = worker.ask("write", prompt_tokens=PROMPT, new_tokens=NEW, way=way)
        found[way] = one["tokens"] / one["seconds"]
    return found


def measure(model: str, threads: int, paths: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """One row for each form and way."""
    taken: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        workers = {form: stack.enter_context(opened(form, path, threads)) for form, path in paths.items()}
        for number in range(rounds + 1):
            for form, worker in workers.items():
                for way, speed in speeds(form, worker).items():
                    if number:
                        taken.setdefault((form, way), []).append(speed)
    rows = []
    for (form, way), own in taken.items():
        row: dict[str, Any] = {
            "model": model, "threads": threads, "form": form, "way": way, "MB": size(paths[form]) / 1e6,
            "tokens a second": statistics.median(own),
        }  # fmt: skip
        for other in AGAINST:
            theirs = taken.get((other, way)) or next((v for (name, _), v in taken.items() if name == other), None)
            if theirs and other != form:
                ratios = [mine / one for mine, one in zip(own, theirs, strict=True)]
                row[f"times {other}"] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(row)
    return rows


def size(path: Path) -> int:
    """Bytes of the weights."""
    return path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("demo", "1b"), default="demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default=",".join(FORMS), help="forms, with commas")
    parser.add_argument("--folder", type=Path, help="where the forms of the model are kept for the next time")
    parser.add_argument("--make", action="store_true", help="make them, and measure nothing")
    options = parser.parse_args()
    if not is_installed():
        raise SystemExit(f"llama.cpp is not installed: {INSTALL}")
    import secateur_kernels

    chosen = options.only.split(",")
    path = _common.RESULTS / "decode.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        paths = {form: make(options.model, form, folder) for form in FORMS if form in chosen}
        if options.make:
            return
        threads = list(map(int, options.threads.split(",")))
        found = [row for number in threads for row in measure(options.model, number, paths, options.rounds)]
    kept = [row for row in before if row["model"] != options.model or row["threads"] not in threads]
    rows = sorted(kept + found, key=lambda row: (row["model"] != "demo", row["threads"]))
    _common.store(
        "decode", " ".join(__doc__.split("\n\n")[1].split()), rows, variant=secateur_kernels.variant(),
        kernels=secateur_kernels.__version__, prompt_tokens=len(PROMPT), new_tokens=NEW, rounds=options.rounds,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Do pruned models generalise better? A sentence encoder fine-tuned on SST-2 at several sparsities, by several methods.

Every run trains the same encoder (all-MiniLM-L6-v2 with a new head; embeddings stay as they are) for the same number
of steps on the same examples, in the order its seed gives, with forward and backward in bfloat16 and weights in
float32. One-shot magnitude and Wanda prune after two thirds of the steps and hold the zeros for the last third;
gradual and movement prune between a tenth and two thirds; lottery rewinding has three rounds in the same number of
steps. The gap is the loss on the development set less the loss on the training examples. Intervals are 95 %, by
Student's t over the seeds.

    SECATEUR_DATA=folder python benchmarks/generalisation.py [--seeds 3] [--examples 800] [--epochs 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _common
import torch
import transformers

import secateur
from secateur import SparsityCallback
from secateur.checkpoint.source import open_source
from secateur.corpus.labelled import read_labelled
from secateur.measure.classify import classify
from secateur.verbs.calibration import load_tokenizer

SPARSITIES = (0.2, 0.4, 0.6, 0.8, 0.9)
METHODS = ("magnitude", "gradual", "wanda", "movement", "lottery")
BATCH, RATE = 16, 1e-4
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of Student's t for two-sided 95 %, by the number of values."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(STUDENT))
    parser.add_argument("--examples", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--log", type=Path, help="append every run to this file, and take finished runs from it")
    options = parser.parse_args()
    data = _common.data_folder()
    done: dict[str, list[float]] = {}
    if options.log and options.log.exists():
        done = {row["run"]: row["found"] for row in map(json.loads, options.log.read_text().splitlines())}
    runs = [("dense", 0.0)] + [(method, sparsity) for sparsity in SPARSITIES for method in METHODS]
    rows: list[dict[str, Any]] = []
    for method, sparsity in runs:
        values = []
        for seed in range(options.seeds):
            key = f"{method} {sparsity} {seed} {options.examples} {options.epochs}"
            if key not in done:
                done[key] = list(_run(method, sparsity, seed, data, options.examples, options.epochs))
                if options.log:
                    with options.log.open("a") as file:
                        file.write(json.dumps({"run": key, "found": done[key]}) + "\n")
            values.append(done[key])
        columns = zip(("accuracy", "training loss", "development loss", "gap"), zip(*values, strict=True), strict=True)
        row: dict[str, Any] = {"method": method, "sparsity": sparsity}
        for name, column in columns:
            half = STUDENT[len(column)] * statistics.stdev(column) / len(column) ** 0.5
            row[name] = f"{statistics.mean(column):.3f} ± {half:.3f}"
        rows.append(row)
        print(json.dumps(row), flush=True)
    _common.store("generalisation", " ".join(__doc__.split("\n\n")[1].split()), rows, examples=options.examples)


def _run(method: str, sparsity: float, seed: int, data: Path, examples: int, epochs: int) -> tuple[float, ...]:
    """Accuracy on the development set, loss on the training examples and on the development set, and the gap."""
    source = open_source("demo-encoder")
    tokenizer = load_tokenizer(source.folder)
    train = read_labelled(data / "sst2-train.jsonl", labels={0: "0", 1: "1"})
    dev = read_labelled(data / "sst2-dev.jsonl", labels={0: "0", 1: "1"})
    train.texts[examples:], train.labels[examples:], train.lines[examples:] = [], [], []
    transformers.set_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # that the head is new is no news
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source.folder, num_labels=2)
    # Half of the parameters, and a step's time with them; no method prunes them.
    model.bert.embeddings.requires_grad_(False)
    rows = [
        {**tokenizer(text, truncation=True, max_length=64), "labels": label}
        for text, label in zip(train.texts, train.labels, strict=True)
    ]
    steps = epochs * len(rows) // BATCH
    with tempfile.TemporaryDirectory() as scratch:

        def learn(count: int, callbacks: list[Any], first: bool = True) -> None:
            arguments = transformers.TrainingArguments(
                scratch, max_steps=count, per_device_train_batch_size=BATCH, learning_rate=RATE, seed=seed,
                use_cpu=True, bf16=True, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
                warmup_steps=count // 10 if first else 0, lr_scheduler_type="linear",
                train_sampling_strategy="group_by_length",
            )  # fmt: skip
            transformers.Trainer(
                model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
            ).train()

        if method == "dense":
            learn(steps, [])
        elif method in ("magnitude", "wanda"):
            learn(2 * steps // 3, [])
            text = Path(scratch) / "calibration.txt"
            text.write_text("\n\n".join(train.texts), encoding="utf-8")
            secateur.prune(
                model.eval(), method=method, sparsity=sparsity, tokenizer=tokenizer, calibration=text,
                sequence_length=256, evaluate=False, verify=False,
            )  # fmt: skip
            learn(steps - 2 * steps // 3, [SparsityCallback("hold")], first=False)
        elif method == "lottery":
            learn(steps, [SparsityCallback("lottery", sparsity=sparsity, rounds=3)])
        else:
            learn(steps, [SparsityCallback(method, sparsity=sparsity, begin=0.1, end=0.67)])
    with torch.no_grad():
        seen, unseen = (classify(model.eval(), tokenizer, part, resamples=10) for part in (train, dev))
    return unseen.accuracy, seen.loss, unseen.loss, unseen.loss - seen.loss


if __name__ == "__main__":
    main()

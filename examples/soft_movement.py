"""Prune a text classifier by learned scores; the penalty decides how many weights go.

python examples/soft_movement.py [MODEL] [DATA.jsonl]   the data has a text and a label in each line
"""

import json
import os
import sys
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from secateur import SparsityCallback
from secateur.checkpoint.source import open_source

folder = open_source(sys.argv[1] if len(sys.argv) > 1 else "demo-encoder").folder
data = Path(sys.argv[2] if len(sys.argv) > 2 else f"{os.environ['SECATEUR_DATA']}/sst2-train.jsonl")
rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
names = sorted({row["label"] for row in rows})
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
examples = [{**tokenizer(r["text"], truncation=True, max_length=64), "labels": names.index(r["label"])} for r in rows]
held_out = len(examples) // 10
callback = SparsityCallback("soft-movement", penalty=100.0, threshold=0.1)
trainer = Trainer(
    model,
    TrainingArguments("trained", save_strategy="no", report_to="none", num_train_epochs=3),
    train_dataset=examples[held_out:],
    eval_dataset=examples[:held_out],
    processing_class=tokenizer,
    compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    callbacks=[callback],
)
trainer.train()
print(f"sparsity {callback.sparsity:.3f}, accuracy {trainer.evaluate()['eval_accuracy']:.3f}")  # noqa: T201
